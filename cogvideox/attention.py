"""The attention kernel that each backend runs, behind one interface.

An AttentionKernel takes the q, k and v of one device with the sequence last, [B, N, D, S].
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from splash_attention import query_scale, sequence_minor_attention
from splash_attention.reference import reference_attention


@dataclasses.dataclass(frozen=True)
class AttentionKernel:
    """One way to attend.

    Attributes:
        name: as --attention has it.
        attend: q, k, v [B, N, D, S] and the number of real keys -> [B, N, D, S]; keys past that
            number take no part.
        token_multiple: S of each device should be a multiple of this.
        query_scale: head_dim -> what the caller multiplies q with before it rounds it.
    """

    name: str
    attend: Callable[[jax.Array, jax.Array, jax.Array, int], jax.Array]
    token_multiple: int = 1
    query_scale: Callable[[int], float] = lambda head_dim: 1.0


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


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, keys: int) -> jax.Array:
    k = jnp.swapaxes(k, -1, -2)
    return sequence_minor_attention(q, k[..., :keys, :], v[..., :keys])


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, keys: int) -> jax.Array:
    # jax.nn has [B, S, N, D].
    q, k, v = (x.transpose(0, 3, 1, 2) for x in (q, k[..., :keys], v[..., :keys]))
    out = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    return out.transpose(0, 2, 3, 1)


def _reference(q: jax.Array, k: jax.Array, v: jax.Array, keys: int) -> jax.Array:
    q, k, v = (jnp.swapaxes(x, -1, -2) for x in (q, k[..., :keys], v[..., :keys]))
    return jnp.swapaxes(reference_attention(q, k, v), -1, -2)


KERNELS = {
    # 128 lanes: a shorter last tile would be padded in every array.
    "splash": AttentionKernel("splash", _splash, 128, query_scale),
    "cudnn": AttentionKernel("cudnn", _cudnn),
    "reference": AttentionKernel("reference", _reference),
}


def padded_tokens(tokens: int, kernel: AttentionKernel, shards: int) -> int:
    """The sequence length that splits evenly into `shards` of the kernel's multiple."""
    multiple = math.lcm(shards, kernel.token_multiple * shards)
    return -(-tokens // multiple) * multiple
