"""The kernel's operands and arguments, from shapes, lists of chunks and the chip."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from splash_attention.block_lists import BlockLists
from splash_attention.block_sizes import BlockSizes, choose_block_sizes, current_chip
from splash_attention.kernel import can_lie_side_by_side

HEAD_DIM_STEP = 64


def flatten_heads(
    q: jax.Array, k: jax.Array, v: jax.Array, beside: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Reshape checked operands to q [N, D, S], k [N / beside, K, beside x D] and v [N, D, K].

    D is padded with zeros to a multiple of 64; that of q and k may be the rows of two digits. Keys
    that cannot be read side by side become [N, K, D].
    """
    rows = q.shape[-2]
    q, v = (_pad_rows(x.reshape(-1, *x.shape[-2:])) for x in (q, v))
    k = k.reshape(-1, k.shape[-2], beside, rows)
    if rows % HEAD_DIM_STEP:
        k = jnp.pad(k, ((0, 0), (0, 0), (0, 0), (0, -rows % HEAD_DIM_STEP)))
    if beside > 1 and not can_lie_side_by_side(q.shape[1], beside):
        k = k.swapaxes(1, 2).reshape(len(q), k.shape[1], -1)
    return q, k.reshape(*k.shape[:2], -1), v


def _pad_rows(x: jax.Array) -> jax.Array:
    """Pad x [N, D, S] with zeros to a multiple of 64 rows."""
    missing = -x.shape[1] % HEAD_DIM_STEP
    return jnp.pad(x, ((0, 0), (0, missing), (0, 0))) if missing else x


def list_arguments(
    block_lists: BlockLists,
    rule: jax.Array | None,
    q: jax.Array,
    keys: int,
    kv_len: int,
    window_size: int | None,
    block_sizes: BlockSizes | None,
) -> dict[str, Any]:
    """Check lists of chunks; return the kernel's keyword arguments lists and listed_valid.

    Raises:
        ValueError: the lists are of other lengths, or combined with an option they replace.
    """
    if window_size is not None or block_sizes is not None or kv_len != keys:
        raise ValueError("block_lists replace window_size, block_sizes and kv_len; pass only one")
    rule = block_lists.rule_of_heads(rule, q.shape[:-2], q.shape[-1], keys)
    tables = block_lists.chunks, block_lists.lengths, block_lists.valid
    arrays = (rule.reshape(-1), *map(jnp.asarray, tables))
    return {
        "lists": tuple(array.astype(jnp.int32) for array in arrays),
        "listed_valid": block_lists.least_valid,
    }


def how_to_run(
    block_sizes: BlockSizes | None,
    head_dim: int,
    q_len: int,
    kv_len: int,
    dtype: jnp.dtype,
    interpret: bool | pltpu.InterpretParams,
) -> dict[str, Any]:
    """Return the kernel's keyword arguments block_sizes, vmem_limit_bytes and interpret."""
    chip = current_chip(interpret=bool(interpret))
    if not isinstance(block_sizes, BlockSizes | None):
        raise TypeError(f"block_sizes is {block_sizes!r}; it must be a BlockSizes or None")
    if block_sizes is None:
        block_sizes = choose_block_sizes(chip, head_dim, q_len, kv_len, dtype)
    return {
        "block_sizes": block_sizes,
        "vmem_limit_bytes": chip.require_vmem(block_sizes, head_dim, dtype),
        "interpret": pltpu.InterpretParams() if interpret is True else interpret,
    }
