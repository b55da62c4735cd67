"""Backends for GPU: the Hopper kernel or cuDNN for attention, and XLA for everything else."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from cogvideox.transformer.backends.base import Bounds, Listed, Queries
from cogvideox.transformer.backends.xla import XlaBackend
from cogvideox.transformer.projections import in_order, own_first
from splash_attention import query_scale
from splash_attention.hopper.attention import choose_config, hopper_attention, load_runtime
from splash_attention.hopper.tiles import ROW_MULTIPLE

_TILE = 128  # keys per tile


@dataclasses.dataclass(frozen=True)
class HopperBackend(XlaBackend):
    """Runs splash attention on a GPU of compute capability 9.0 (`--attention splash`)."""

    name = "splash"
    token_multiple = ROW_MULTIPLE
    takes_lists = True

    def __post_init__(self) -> None:
        load_runtime()

    def attend(
        self,
        q: Queries,
        k: jax.Array,
        v: jax.Array,
        head_dim: int,
        keys: int | Listed,
        bounds: Bounds,
    ) -> jax.Array:
        assert isinstance(q, jax.Array)
        if isinstance(keys, Listed):
            q = in_order(q)  # lists are of consecutive queries
        rows = q.shape
        q, k, v = (x.reshape(*x.shape[:2], -1, head_dim) for x in (q, k, v))
        batch, _, heads, _ = q.shape
        visible: dict[str, Any] = {"kv_len": keys}
        if isinstance(keys, Listed):
            rule = jnp.broadcast_to(keys.rule, (batch, heads))
            visible = {"block_lists": keys.lists, "rule": rule}
        out, _ = hopper_attention(
            *(q, k, v),
            factor=1.0,
            largest_score=jnp.broadcast_to(bounds.scores, (batch, heads)),
            largest_value=bounds.values.reshape(batch, heads, head_dim).max(-1),
            **visible,
        )
        out = out.reshape(rows)
        return own_first(out) if isinstance(keys, Listed) else out

    def query_scale(self, head_dim: int) -> float:
        return query_scale(head_dim)

    def block_sizes(self, head_dim: int, queries: int, keys: int, dtype: str) -> dict[str, int]:
        return dataclasses.asdict(choose_config(head_dim))


@dataclasses.dataclass(frozen=True)
class GpuBackend(XlaBackend):
    """Computes attention with cuDNN, in bfloat16 (`--attention cudnn`)."""

    name = "cudnn"
    token_multiple = _TILE

    def attend(
        self,
        q: Queries,
        k: jax.Array,
        v: jax.Array,
        head_dim: int,
        keys: int | Listed,
        bounds: Bounds,
    ) -> jax.Array:
        """Runs cuDNN on full tiles of keys and adds the remaining keys separately.

        cuDNN is slow if the keys end inside a tile. On an H200 a block of 2 x 48 heads x 45,106
        tokens takes 110.4 ms this way, 119.9 ms in one call, and 116.6 ms with padded and masked
        keys.
        """
        assert not isinstance(keys, Listed)  # `takes_lists` says so
        assert isinstance(q, jax.Array)
        rows = q.shape
        q, k, v = (x.reshape(*x.shape[:2], -1, head_dim) for x in (q, k, v))
        attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
        whole = keys - keys % _TILE
        if whole in (0, keys):
            out = attend(q, k[:, :keys], v[:, :keys])
        else:
            out, log_total = attend(q, k[:, :whole], v[:, :whole], return_residual=True)
            out = add_keys(out, log_total, q, k[:, whole:keys], v[:, whole:keys])
        return out.reshape(rows)


def add_keys(
    out: jax.Array, log_total: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array
) -> jax.Array:
    """Adds a few keys to a computed softmax attention, exactly.

    Args:
        out: attention over the first keys [B, S, N, D].
        log_total: logarithm of its softmax denominators [B, S, N] float32.
        q: [B, S, N, D].
        k, v: the keys and values to add [B, K, N, D]; scores [B, S, N, K] are materialised.
    """
    scores = jnp.einsum("bsnd,bknd->bsnk", q, k, preferred_element_type=jnp.float32)
    scores = scores / math.sqrt(q.shape[-1])
    highest = jnp.maximum(scores.max(-1), log_total)[..., None]
    weights, so_far = jnp.exp(scores - highest), jnp.exp(log_total[..., None] - highest)
    total = so_far + weights.sum(-1, keepdims=True)
    added = jnp.einsum(
        "bsnk,bknd->bsnd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return ((out.astype(jnp.float32) * so_far + added) / total).astype(q.dtype)
