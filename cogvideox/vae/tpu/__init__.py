"""Decoder layers with Pallas TPU kernels."""
