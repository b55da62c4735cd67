"""The transformer: parameters, blocks and the kernels of each backend."""
