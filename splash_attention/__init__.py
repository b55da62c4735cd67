"""Exact attention for TPU, fast at head size 64. Needs only JAX."""

from splash_attention.attention import (
    attention_part,
    query_scale,
    sequence_minor_attention,
    splash_attention,
)
from splash_attention.block_sizes import BlockSizes

__all__ = [
    "BlockSizes",
    "attention_part",
    "query_scale",
    "sequence_minor_attention",
    "splash_attention",
]
