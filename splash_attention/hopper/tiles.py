"""Sizes of the Hopper kernel's tiles, apart from the kernel: importing Mosaic GPU takes 0.3 s."""

import dataclasses
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from splash_attention.block_lists import BlockLists

ROW_MULTIPLE = 8  # rows of a shared-memory tile; S and K must be multiples of it


@dataclasses.dataclass(frozen=True)
class HopperConfig:
    """How a thread block is laid out.

    Attributes:
        warpgroups: computing warpgroups, each of 64 queries.
        block_kv: keys of a tile.
        stages: tiles in shared memory.
        registers: registers of a computing thread.
    """

    warpgroups: int
    block_kv: int
    stages: int
    registers: int


class Keys(Protocol):
    """The tiles of keys that a tile of queries visits; the valid keys are the first of each.

    The tile that comes last in order is visited first: the last of a dense sequence is the one that
    may end in padding, and the online path starts from a maximum, so its first tile needs a key.
    """

    @property
    def tiles(self) -> int | jax.Array:
        """Number of tiles, at least 1."""
        ...

    @property
    def padded(self) -> Literal["never", "once", "often"]:
        """How many tiles end in padding."""
        ...

    def start(self, i: jax.Array) -> jax.Array:
        """Return the first row of the i-th tile."""
        ...

    def valid(self, i: jax.Array) -> jax.Array:
        """Return the number of valid keys of the i-th tile, at least 1."""
        ...


@dataclasses.dataclass(frozen=True)
class AllKeys:
    """The tiles of the first `kv_len` keys; see `Keys`."""

    kv_len: int
    block: int

    @property
    def tiles(self) -> int:
        return -(-self.kv_len // self.block)

    @property
    def end(self) -> int:
        """End of the rows of k and v that the kernel reads, padding included."""
        return self.tiles * self.block

    @property
    def padded(self) -> Literal["never", "once"]:
        return "never" if self.kv_len == self.end else "once"

    def start(self, i: jax.Array) -> jax.Array:
        tile = jnp.where(i == 0, self.tiles - 1, i - 1)
        return pl.multiple_of(tile * self.block, ROW_MULTIPLE)

    def valid(self, i: jax.Array) -> jax.Array:
        return jnp.where(i == 0, self.kv_len - self.end + self.block, self.block)


class ListTables(NamedTuple):
    """Lists of chunks as lists of the kernel's tiles of keys, without tiles of padding.

    Attributes:
        rule: int32 [B, N], the rule of each head.
        counts: int32 [rules, tiles of queries], entries in use.
        starts: int32 [rules, tiles of queries, entries], first row of each tile.
        valid: int32, the same shape, valid keys at its start.
    """

    rule: jax.Array
    counts: jax.Array
    starts: jax.Array
    valid: jax.Array


@dataclasses.dataclass(frozen=True)
class ListedKeys:
    """The tiles that a list names, read from the tables in global memory; see `Keys`."""

    tables: ListTables  # references
    rule: jax.Array
    tile: jax.Array

    @property
    def tiles(self) -> jax.Array:
        return self.tables.counts[self.rule, self.tile]

    @property
    def padded(self) -> Literal["often"]:
        return "often"

    def start(self, i: jax.Array) -> jax.Array:
        start = self.tables.starts[self.rule, self.tile, i]
        return pl.multiple_of(start, ROW_MULTIPLE)

    def valid(self, i: jax.Array) -> jax.Array:
        return self.tables.valid[self.rule, self.tile, i]


def list_tables(lists: BlockLists, rule: jax.Array, block: int) -> ListTables:
    """Return the tables of lists for tiles of `block` keys, which divides their chunks."""
    parts = lists.chunk // block
    chunks = jnp.asarray(lists.chunks)[..., None]
    first = block * jnp.arange(parts, dtype=jnp.int32)
    starts = chunks * lists.chunk + first
    used = jnp.arange(chunks.shape[2]) < jnp.asarray(lists.lengths)[..., None]
    valid = jnp.clip(jnp.asarray(lists.valid)[chunks] - first, 0, block)
    valid = jnp.where(used[..., None], valid, 0)
    starts, valid = (x.reshape(*x.shape[:2], -1) for x in (starts, valid))
    counts = jnp.sum(valid > 0, axis=2, dtype=jnp.int32)
    # Tiles with keys in order, then the last of them moves to the front.
    order = jnp.argsort(valid == 0, axis=2, stable=True)
    place = jnp.arange(valid.shape[2])
    order = jnp.take_along_axis(
        order, jnp.where(place == 0, counts[..., None] - 1, place - 1), axis=2
    )
    starts, valid = (jnp.take_along_axis(x, order, axis=2) for x in (starts, valid))
    return ListTables(rule.astype(jnp.int32), counts, starts, valid.astype(jnp.int32))
