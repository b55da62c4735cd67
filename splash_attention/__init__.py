"""Exact attention for TPU and Hopper GPU, fast at head size 64. Needs only JAX; see README.md."""

from splash_attention.attention import (
    attention_part,
    sequence_minor_attention,
    splash_attention,
)
from splash_attention.block_lists import BlockLists
from splash_attention.block_sizes import BlockSizes
from splash_attention.bounds import query_scale
from splash_attention.hopper.attention import hopper_attention
from splash_attention.quantized import quantized_attention
from splash_attention.reference import reference_attention
from splash_attention.sharded import ring_attention, sharded_attention

__all__ = [
    "BlockLists",
    "BlockSizes",
    "attention_part",
    "hopper_attention",
    "quantized_attention",
    "query_scale",
    "reference_attention",
    "ring_attention",
    "sequence_minor_attention",
    "sharded_attention",
    "splash_attention",
]
