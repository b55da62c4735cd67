"""Run a stage on the TPU code path without a TPU; see `__main__`."""
