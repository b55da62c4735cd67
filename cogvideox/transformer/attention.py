"""The attention kernel that each backend runs, behind one interface.

A kernel works on one device, on all tokens of some heads: R = heads x D rows.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cogvideox.transformer.modulated_norm import norm_and_modulate, norm_and_modulate_tpu
from cogvideox.transformer.projections import (
    in_order,
    own_first,
    project,
    project_out,
    project_out_tpu,
    project_tpu,
)
from cogvideox.transformer.qk_norm import Rotary, norm_and_rotate
from cogvideox.transformer.tpu.token_shards import (
    join_values_tpu,
    norm_and_rotate_tpu,
    part_tokens_tpu,
)
from splash_attention import query_scale, sequence_minor_attention
from splash_attention.block_sizes import choose_block_sizes, current_chip
from splash_attention.reference import reference_attention

_CUDNN_TILE = 128


class Bounds(NamedTuple):
    """What no number of a head exceeds in magnitude; kernels may leave out checks by it."""

    scores: jax.Array  # [] float32, of all heads
    values: jax.Array  # [b, R], of each row of v


def _queries(x: jax.Array, weight: jax.Array, bias: jax.Array, rotary: Rotary | None) -> jax.Array:
    return norm_and_rotate(x, weight, bias, rotary and tuple(map(own_first, rotary)))


def _keys(x: jax.Array, weight: jax.Array, bias: jax.Array, rotary: Rotary | None) -> jax.Array:
    return in_order(_queries(x, weight, bias, rotary))


def _values(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return in_order(x), jnp.abs(x).max(1)


def _values_tpu(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return (x[:, 0], jnp.abs(x[:, 0]).max(-1)) if x.shape[1] == 1 else join_values_tpu(x)


def _project_out_tpu(x: jax.Array, weight: jax.Array) -> jax.Array:
    shards = jax.lax.axis_size("sp")
    return project_out_tpu(x[:, None] if shards == 1 else part_tokens_tpu(x, shards), weight)


@dataclasses.dataclass(frozen=True)
class AttentionKernel:
    """One way to attend, from a device's own tokens and back to them.

    Attributes:
        name: as --attention has it.
        attend: q, k, v, head_dim, real keys, Bounds -> output like q; keys past that number take no
            part. All are [b, S, R], with k and v in the order of the sequence and q with the
            device's own tokens first. The TPU kernel has all in the order of the sequence, and q, v
            and the output as [b, R, S]: what it multiplies without a transpose.
        norm_and_modulate: as `modulated_norm` has it, before the projections.
        project, project_out: as `exchange` has them, around attention.
        queries: raw q from `project`, the norm's weight and bias [D], rotary tables [D / 2, S] -> q
            normed and rotated, for `attend`.
        keys: the same for k.
        values: raw v -> v, and the largest magnitude of each row [b, R].
        token_multiple: s should be a multiple of this.
        query_scale: head_dim -> what q is multiplied with before it is rounded.
        block_sizes: head_dim, queries, keys, dtype -> tiles by name, on the chip compiled for.
    """

    name: str
    attend: Callable[[jax.Array, jax.Array, jax.Array, int, int, Bounds], jax.Array]
    norm_and_modulate: Callable[..., jax.Array] = norm_and_modulate
    project: Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array] = project
    project_out: Callable[[jax.Array, jax.Array], jax.Array] = project_out
    queries: Callable[..., jax.Array] = _queries
    keys: Callable[..., jax.Array] = _keys
    values: Callable[[jax.Array], tuple[jax.Array, jax.Array]] = _values
    token_multiple: int = 1
    query_scale: Callable[[int], float] = lambda head_dim: 1.0
    block_sizes: Callable[[int, int, int, str], dict[str, int]] = lambda *_: {}


def choose_attention(choice: str, backend: str, dtype: str) -> AttentionKernel:
    """The kernel for `choice` (auto, splash, cudnn or reference) on a backend.

    Args:
        backend: jax.default_backend(): "tpu", "gpu" or "cpu".
        dtype: of q, k and v.

    Raises:
        ValueError: the backend cannot run what was asked for.
    """
    if choice == "auto":
        cudnn_runs = backend == "gpu" and dtype == "bfloat16"
        choice = "splash" if backend == "tpu" else "cudnn" if cudnn_runs else "reference"
    needed = {"splash": "tpu", "cudnn": "gpu"}.get(choice, backend)
    if needed != backend:
        raise ValueError(
            f"--attention {choice} needs a {needed.upper()}, this is a {backend.upper()}; "
            "use auto or reference"
        )
    if choice == "cudnn" and dtype != "bfloat16":
        raise ValueError(f"--attention cudnn computes bfloat16 only, not {dtype}; use reference")
    return KERNELS[choice]


def _splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    head_dim: int,
    keys: int,
    bounds: Bounds,
    interpret: bool = False,
) -> jax.Array:
    q, v = (x.reshape(x.shape[0], -1, head_dim, x.shape[-1]) for x in (q, v))
    out = sequence_minor_attention(
        *(q, k, v),
        kv_len=keys,
        largest_score=jnp.broadcast_to(bounds.scores, q.shape[:2]),
        largest_value=bounds.values.reshape(*q.shape[:2], head_dim).max(-1),
        interpret=interpret,
    )
    return out.reshape(out.shape[0], -1, out.shape[-1])


def _splash_block_sizes(head_dim: int, queries: int, keys: int, dtype: str) -> dict[str, int]:
    sizes = choose_block_sizes(
        current_chip(interpret=False), head_dim, queries, keys, jnp.dtype(dtype)
    )
    return dataclasses.asdict(sizes)


def _cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, head_dim: int, keys: int, _: Bounds
) -> jax.Array:
    """cuDNN on whole blocks of keys, the last few added outside.

    On an H200 a block of 2 x 48 heads x 45,106 tokens takes 119.9 ms in one call (116.6 with the
    keys padded and masked), 110.4 this way: cuDNN is slow where the keys end inside a tile.
    """
    rows = q.shape
    q, k, v = (x.reshape(*x.shape[:2], -1, head_dim) for x in (q, k, v))
    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    whole = keys - keys % _CUDNN_TILE
    if whole in (0, keys):
        out = attend(q, k[:, :keys], v[:, :keys])
    else:
        out, log_total = attend(q, k[:, :whole], v[:, :whole], return_residual=True)
        out = add_keys(out, log_total, q, k[:, whole:keys], v[:, whole:keys])
    return out.reshape(rows)


def add_keys(
    out: jax.Array, log_total: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array
) -> jax.Array:
    """Softmax attention over some keys, extended exactly by a few more.

    Args:
        out: attention over the keys so far [B, S, N, D].
        log_total: logarithm of its softmax denominators [B, S, N] float32.
        q: [B, S, N, D].
        k, v: the further keys and values [B, K, N, D]; scores of [B, S, N, K] are made.
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


def _reference(
    q: jax.Array, k: jax.Array, v: jax.Array, head_dim: int, keys: int, _: Bounds
) -> jax.Array:
    q, k, v = (x.reshape(*x.shape[:2], -1, head_dim) for x in (q, k[:, :keys], v[:, :keys]))
    out = reference_attention(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v)))
    return jnp.swapaxes(out, 1, 2).reshape(*q.shape[:2], -1)


KERNELS = {
    # 128 lanes: a shorter last tile would be padded in every array.
    "splash": AttentionKernel(
        "splash",
        _splash,
        norm_and_modulate=norm_and_modulate_tpu,
        project=project_tpu,
        project_out=_project_out_tpu,
        queries=norm_and_rotate_tpu,
        keys=functools.partial(norm_and_rotate_tpu, transposed=True),
        values=_values_tpu,
        token_multiple=128,
        query_scale=query_scale,
        block_sizes=_splash_block_sizes,
    ),
    "cudnn": AttentionKernel("cudnn", _cudnn, token_multiple=_CUDNN_TILE),
    "reference": AttentionKernel("reference", _reference),
}


def padded_tokens(tokens: int, kernel: AttentionKernel, shards: int) -> int:
    """The sequence length that splits evenly into `shards` of the kernel's multiple."""
    multiple = kernel.token_multiple * shards
    return -(-tokens // multiple) * multiple
