"""The VAE's encoders and decoders."""
