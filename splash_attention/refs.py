"""What the bodies of the kernel read: static parameters, references, chunks of keys.

Axis letters: N heads (batch and heads flattened), S queries, K keys, D head size.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """Static parameters of one kernel call."""

    block_q: int
    block_kv: int
    chunk: int
    unroll: int
    q_len: int
    kv_blocks: int
    # Keys before this index are always valid; later chunks compare with `kv_len`.
    always_valid: int
    window_size: int | None
    quantized: bool
    with_log_total: bool
    # Heads whose keys share a block of k; the queries of the other heads are zero.
    packed: int
    # With lists of chunks, a lower bound on the valid keys of every listed chunk; else None.
    listed_valid: int | None

    @property
    def group(self) -> int:
        """Keys per unrolled body."""
        return self.unroll * self.chunk

    @property
    def groups(self) -> int:
        """Bodies per block of keys, without lists of chunks."""
        return self.block_kv // self.group

    @property
    def first_checked_chunk(self) -> int:
        """Index in a group of the first chunk that may hold padding."""
        last_group = (self.kv_blocks * self.groups - 1) * self.unroll
        return max(0, self.always_valid // self.chunk - last_group)


class Chunk(NamedTuple):
    """A chunk of keys that a body visits."""

    start: jax.Array  # first key, in the block
    valid: jax.Array | None  # number of valid keys, at its start; None compares with `kv_len`


@dataclasses.dataclass(frozen=True)
class ListRefs:
    """Lists of the chunks that each tile of queries visits, int32 in SMEM; see `BlockLists`."""

    rule: jax.Ref  # [N], the rule of each head
    chunks: jax.Ref  # [rules, tiles, entries]
    lengths: jax.Ref  # [rules, tiles], entries in use
    valid: jax.Ref  # [chunks], valid keys at the start of each chunk

    @property
    def length(self) -> jax.Array:
        """Length of the list of this grid step's tile."""
        return self.lengths[self.rule[pl.program_id(0)], pl.program_id(1)]

    def chunk(self, config: KernelConfig, entry: jax.Array) -> Chunk:
        """Return an entry of this tile's list; entries past its end have no valid keys."""
        index = self.chunks[self.rule[pl.program_id(0)], pl.program_id(1), entry]
        start = pl.multiple_of(index * config.chunk, config.chunk)
        return Chunk(start, jnp.where(entry < self.length, self.valid[index], 0))


@dataclasses.dataclass(frozen=True)
class Refs:
    """References that a body reads and writes, in VMEM unless said otherwise."""

    kv_len: jax.Ref  # [1] int32, in SMEM
    q: jax.Ref  # [packed x R, block_q]; R is D, or 2 D for int8 operands
    q_scale: jax.Ref | None  # [1, block_q] bfloat16, with int8 operands only
    k: jax.Ref  # [block_kv, packed x R]
    v: jax.Ref  # [D, block_kv]
    shift: jax.Ref  # [1, block_q] float32, the running maximum
    total: jax.Ref  # [8, block_q] float32, partial denominators
    acc: jax.Ref  # [D, block_q] float32
    lists: ListRefs | None
