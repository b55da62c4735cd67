"""Tuned tiles, written by benchmarks/tune_block_sizes.py. Do not edit.

TABLES[chip][head size] is a tuple of (keys at most, block_q, chunk, unroll at most), by ascending
number of keys; the last row is also for more keys.
"""

TABLES = {
    "v5e": {
        64: (
            (1024, 1024, 256, 32),
            (17920, 512, 128, 64),
        ),
        128: (
            (1024, 512, 512, 32),
            (17920, 512, 128, 64),
        ),
        256: (
            (1024, 512, 256, 64),
        ),
    },
    "v5p": {
        64: (
            (1024, 512, 512, 32),
            (17920, 512, 256, 64),
        ),
        128: (
            (1024, 512, 512, 32),
            (17920, 512, 128, 64),
        ),
        256: (
            (1024, 512, 256, 64),
        ),
    },
    "v6e": {
        64: (
            (1024, 1024, 256, 32),
            (17920, 512, 256, 64),
        ),
        128: (
            (1024, 1024, 256, 32),
            (17920, 512, 256, 64),
        ),
        256: (
            (1024, 1024, 256, 32),
            (17920, 512, 256, 64),
        ),
    },
}
