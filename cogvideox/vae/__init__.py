"""The VAE decoders."""
