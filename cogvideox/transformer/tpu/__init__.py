"""Pallas TPU kernels of the transformer."""
