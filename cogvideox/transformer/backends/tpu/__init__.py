"""Pallas TPU kernels and the backend that runs them."""
