"""Sizes of the Hopper kernel's tiles, apart from the kernel: importing Mosaic GPU takes 0.3 s."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

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


@dataclasses.dataclass(frozen=True)
class Keys:
    """The tiles of keys. The first one may overlap the last; its repeated keys are masked.

    So every tile is whole, and all but the first need no mask. It comes first because then the
    online path starts from its maximum.
    """

    kv_len: int
    block: int

    @property
    def tiles(self) -> int:
        return -(-self.kv_len // self.block)

    @property
    def first_start(self) -> int:
        """First row of the first tile; it ends with the last key, rounded up to a row tile."""
        return max(-(-self.kv_len // ROW_MULTIPLE) * ROW_MULTIPLE - self.block, 0)

    @property
    def first_valid(self) -> tuple[int, int]:
        """Columns of the first tile that hold keys which are in no other tile."""
        return (self.tiles - 1) * self.block - self.first_start, self.kv_len - self.first_start

    def start(self, i: jax.Array) -> jax.Array:
        """Return the first row of tile i."""
        start = jnp.where(i == 0, self.first_start, (i - 1) * self.block)
        return pl.multiple_of(start, ROW_MULTIPLE)


def last_row_read(kv_len: int, block_kv: int) -> int:
    """Return the end of the rows of k and v that the kernel reads, padding included."""
    return Keys(kv_len, block_kv).first_start + block_kv
