"""Attention's projections in XLA, with the all-to-all over sp (DeepSpeed Ulysses).

Before attention, shards of tokens become shards of heads; after attention, the reverse. A device
has R = heads x D rows; S = shards x s tokens. The exchange overlaps the products: each part is sent
as soon as it is computed. The device's own tokens come first, so received parts need no copy. In
sequence order, a device would have to concatenate its own part with the received ones.
"""

import jax
import jax.numpy as jnp

from cogvideox.transformer.linear import linear, linear_to_tokens_first


def project(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Projects to q, k or v, for this device's heads and all tokens.

    Args:
        x: [b, E, s], this device's tokens.
        weight: [shards x R, E], for all heads.
        bias: [shards x R].

    Returns:
        [b, S, R]: this device's tokens, then those of the next shards, cyclically.
    """
    shards, own = jax.lax.axis_size("sp"), jax.lax.axis_index("sp")
    weight = weight.reshape(shards, -1, weight.shape[-1])
    parts = []
    for i in range(shards):
        part = linear_to_tokens_first(x, _at(weight, (own - i) % shards))
        parts.append(_from_shard_before(part, -i))
    out = jnp.concatenate(parts, axis=1)
    return out if bias is None else out + _at(bias.reshape(shards, -1), own)


def project_out(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Projects attention's output for this device's tokens.

    Args:
        x: [b, S, R], attention's output, own tokens first.
        weight: [E, shards x R].

    Returns:
        [b, s, E].
    """
    shards, own = jax.lax.axis_size("sp"), jax.lax.axis_index("sp")
    weight = weight.reshape(weight.shape[0], shards, -1).swapaxes(0, 1)
    stays, *leave = jnp.split(x, shards, axis=1)
    arrive = [_from_shard_before(part, i) for i, part in enumerate(leave, 1)]
    out = linear(stays, _at(weight, own))
    # Without the barrier, XLA waits for the received parts before this product.
    out, own = jax.lax.optimization_barrier((out, own))
    for i, part in enumerate(arrive, 1):
        out = out + linear(part, _at(weight, (own - i) % shards))
    return out


def in_order(x: jax.Array) -> jax.Array:
    """Reorders [b, S, R] from own tokens first to sequence order."""
    shards, own = jax.lax.axis_size("sp"), jax.lax.axis_index("sp")
    size = x.shape[1] // shards
    starts = [(i - own) % shards * size for i in range(shards)]
    parts = [jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for start in starts]
    return jnp.concatenate(parts, axis=1)


def own_first(x: jax.Array) -> jax.Array:
    """Reorders [., S, ...] from sequence order to own tokens first."""
    size = x.shape[1] // jax.lax.axis_size("sp")
    return jnp.roll(x, -jax.lax.axis_index("sp") * size, axis=1)


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, index, keepdims=False)


def _from_shard_before(x: jax.Array, places: int) -> jax.Array:
    """Returns x of the shard `places` before this one along sp, cyclically."""
    shards = jax.lax.axis_size("sp")
    if places == 0:
        return x
    return jax.lax.ppermute(x, "sp", [(i, (i + places) % shards) for i in range(shards)])
