"""Frames to files, and pictures of them."""
