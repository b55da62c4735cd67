"""The denoising step, its schedule and its loop."""
