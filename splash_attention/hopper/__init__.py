"""Attention kernel for NVIDIA Hopper GPUs."""
