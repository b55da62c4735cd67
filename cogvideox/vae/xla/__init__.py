"""Decoder layers with XLA's convolutions."""
