"""Choose the kernel's tile sizes for a shape, and compute the VMEM they need."""

import dataclasses
import math

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from splash_attention.quantize import DIGITS
from splash_attention.tuned_tables import TABLES

_MIB = 2**20

# VMEM of a core. The kernel's limit leaves 8 MiB to the compiler and the code around the kernel.
_CHIP_VMEM_MIB = {"v5e": 128, "v5p": 64, "v6e": 128}
_RESERVED_MIB = 8


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Tile sizes of the kernel, in tokens.

    Attributes:
        block_q: queries per grid step, a multiple of 128.
        block_kv: keys held in VMEM at once, a multiple of chunk x unroll.
        chunk: keys per matrix product, a multiple of 128.
        unroll: chunks per unrolled loop body.
    """

    block_q: int
    block_kv: int
    chunk: int
    unroll: int

    def __post_init__(self) -> None:
        for name in ("block_q", "chunk"):
            value = getattr(self, name)
            if value < 128 or value % 128:
                raise ValueError(f"{name} is {value}; it must be a positive multiple of 128")
        if self.unroll < 1:
            raise ValueError(f"unroll is {self.unroll}; it must be at least 1")
        group = self.chunk * self.unroll
        if self.block_kv < group or self.block_kv % group:
            raise ValueError(
                f"block_kv is {self.block_kv}; it must be a positive multiple of "
                f"chunk x unroll = {group}"
            )

    def vmem_bytes(self, head_dim: int, dtype: jnp.dtype) -> int:
        """Return the VMEM the kernel needs: double-buffered operands, accumulators, temporaries.

        Args:
            head_dim: D.
            dtype: of q and k. With int8, v and the output are bfloat16.
        """
        item = jnp.dtype(dtype).itemsize
        value_item = max(item, 2)
        rows = head_dim * DIGITS if item == 1 else head_dim
        keys = 2 * self.block_kv * _round_up(rows, 128) * item
        values = 2 * self.block_kv * head_dim * value_item
        # The queries, padded to the lanes that two heads of 64 share.
        placed = self.block_q * 128 * item if rows < 128 else 0
        queries_and_outputs = 2 * self.block_q * (rows * item + head_dim * value_item)
        # Maximum, denominators, and two buffers each of log2 denominators and q scales: 8 rows.
        accumulators = self.block_q * (head_dim + 6 * 8) * 4
        # Scores of the chunks in flight: two ahead, one being weighted, in float32 and in the dtype
        # of the values.
        temporaries = 4 * self.chunk * self.block_q * (4 + value_item)
        if item == 4:
            # Each chunk of a body keeps its float32 operands split into three bfloat16.
            temporaries += 6 * self.unroll * self.chunk * (self.block_q + 2 * head_dim)
        return keys + values + placed + queries_and_outputs + accumulators + temporaries


@dataclasses.dataclass(frozen=True)
class KernelChip:
    """The facts of a TPU core that tile sizes depend on.

    Attributes:
        name: TPU generation, a key of the tuned tables.
        vmem_bytes: VMEM that the kernel may use.
    """

    name: str
    vmem_bytes: int

    def require_vmem(self, block_sizes: BlockSizes, head_dim: int, dtype: jnp.dtype) -> int:
        """Return the VMEM limit for the compiler, in bytes.

        Raises:
            ValueError: the tiles need more VMEM.
        """
        need = block_sizes.vmem_bytes(head_dim, dtype)
        if need > self.vmem_bytes:
            raise ValueError(
                f"{block_sizes} at head size {head_dim} in {jnp.dtype(dtype).name} needs "
                f"{need / _MIB:.1f} MiB of VMEM; {self.name} offers {self.vmem_bytes / _MIB:.1f} "
                f"MiB. Make block_kv smaller"
            )
        return self.vmem_bytes


def chip_named(name: str) -> KernelChip:
    """Return the core of a TPU generation: v5e, v5p or v6e.

    Raises:
        ValueError: no tuned table for that name.
    """
    if name not in _CHIP_VMEM_MIB:
        raise ValueError(f"no table for chip {name!r}; there is one for {sorted(_CHIP_VMEM_MIB)}")
    return KernelChip(name, (_CHIP_VMEM_MIB[name] - _RESERVED_MIB) * _MIB)


def current_chip(*, interpret: bool) -> KernelChip:
    """Return the core that JAX compiles for; v6e in interpret mode, which models no chip.

    Raises:
        ValueError: JAX does not compile for a TPU.
    """
    if interpret:
        return chip_named("v6e")
    try:
        info = pltpu.get_tpu_info()
    except ValueError as error:
        raise ValueError(
            f"the kernel needs a TPU or a GPU of compute capability 9.0, or interpret=True to run "
            f"anywhere: {error}"
        ) from error
    return chip_named(str(info.chip_version))


def choose_block_sizes(
    chip: KernelChip, head_dim: int, q_len: int, kv_len: int, dtype: jnp.dtype
) -> BlockSizes:
    """Look up the tuned tile sizes for a chip and fit them to a shape.

    Raises:
        ValueError: the head size exceeds those of the tables, or no block of keys fits VMEM.
    """
    tables = TABLES[chip.name]
    if head_dim > max(tables):
        raise ValueError(f"head size is {head_dim}; the tables of {chip.name} end at {max(tables)}")
    rows = tables[min(tabled for tabled in tables if tabled >= head_dim)]
    _, *tuned = next((row for row in rows if kv_len <= row[0]), rows[-1])
    block_q, chunk, unroll = tuned
    if jnp.dtype(dtype).itemsize == 4:
        # float32 products keep the MXU busy for so long that short bodies suffice.
        unroll = min(unroll, 8)
    if jnp.dtype(dtype).itemsize == 1:
        # int8 chunks are shorter, so filling and draining a body costs relatively more: 45,106 keys
        # of head size 64 on v6e take 26.1M cycles in three bodies, 25.4M in one.
        unroll *= 3
    return fit_block_sizes(chip, (block_q, chunk, unroll), head_dim, q_len, kv_len, dtype)


def fit_block_sizes(
    chip: KernelChip,
    tuned: tuple[int, int, int],
    head_dim: int,
    q_len: int,
    kv_len: int,
    dtype: jnp.dtype,
) -> BlockSizes:
    """Fit tuned sizes to a shape: as few blocks of keys as VMEM allows, in bodies of equal length.

    Equal bodies keep the padding of the keys small.

    Args:
        tuned: block_q, chunk, largest unroll.

    Raises:
        ValueError: not even one chunk of keys fits VMEM.
    """
    block_q, chunk, most_unrolled = tuned
    block_q = min(block_q, _round_up(q_len, 128))
    chunk = min(chunk, _round_up(kv_len, 128))
    all_chunks = math.ceil(kv_len / chunk)
    for kv_blocks in range(1, all_chunks + 1):
        chunks = math.ceil(all_chunks / kv_blocks)
        least = math.ceil(chunks / most_unrolled)
        # Filling and draining a body takes about as long as one chunk.
        groups = min(range(least, 2 * least + 1), key=lambda n: n * (math.ceil(chunks / n) + 1))
        unroll = math.ceil(chunks / groups)
        sizes = BlockSizes(block_q, groups * unroll * chunk, chunk, unroll)
        if sizes.vmem_bytes(head_dim, dtype) <= chip.vmem_bytes:
            return sizes
    raise ValueError(
        f"tiles {tuned} of {jnp.dtype(dtype).name} at head size {head_dim} need "
        f"{sizes.vmem_bytes(head_dim, dtype) / _MIB:.1f} MiB of VMEM with a single chunk of keys; "
        f"{chip.name} offers {chip.vmem_bytes / _MIB:.1f} MiB"
    )


def _round_up(value: int, step: int) -> int:
    return math.ceil(value / step) * step
