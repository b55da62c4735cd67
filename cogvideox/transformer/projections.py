"""Attention's projections and its exchange over sp: some tokens of all heads, all tokens of some.

R = heads x D rows of one device, S = shards x s tokens. The TPU takes all-to-alls, with the tokens
last; XLA runs them beside its products. Other devices exchange part by part, tokens first, with the
device's own tokens first: a part leaves as soon as it is computed and what arrives needs no copy.
With the order of the sequence a device would have to join what it computed and what it received.
"""

import jax
import jax.numpy as jnp


def project(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    """q, k or v of this device's heads, of all tokens.

    Args:
        x: [b, E, s], this device's tokens.
        weight: [shards x R, E], of all heads.
        bias: [shards x R].

    Returns:
        [b, S, R], this device's tokens first, then those of the shards after it, around.
    """
    shards, own = jax.lax.axis_size("sp"), jax.lax.axis_index("sp")
    weight = weight.reshape(shards, -1, weight.shape[-1])
    parts = []
    for i in range(shards):
        part = jnp.einsum("bis,oi->bso", x, _at(weight, (own - i) % shards))
        parts.append(_from_shard_before(part, -i))
    out = jnp.concatenate(parts, axis=1)
    return out if bias is None else out + _at(bias.reshape(shards, -1), own)


def project_out(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The output projection of this device's tokens.

    Args:
        x: [b, S, R], attention's output, in the order that `project` makes.
        weight: [E, shards x R].

    Returns:
        [b, s, E].
    """
    shards, own = jax.lax.axis_size("sp"), jax.lax.axis_index("sp")
    weight = weight.reshape(weight.shape[0], shards, -1).swapaxes(0, 1)
    stays, *leave = jnp.split(x, shards, axis=1)
    arrive = [_from_shard_before(part, i) for i, part in enumerate(leave, 1)]
    out = jnp.einsum("bsi,oi->bso", stays, _at(weight, own))
    # Otherwise XLA waits for what arrives before this product.
    out, own = jax.lax.optimization_barrier((out, own))
    for i, part in enumerate(arrive, 1):
        out = out + jnp.einsum("bsi,oi->bso", part, _at(weight, (own - i) % shards))
    return out


def in_order(x: jax.Array) -> jax.Array:
    """[b, S, R] in the order that `project` makes, to that of the sequence."""
    shards, own = jax.lax.axis_size("sp"), jax.lax.axis_index("sp")
    size = x.shape[1] // shards
    starts = [(i - own) % shards * size for i in range(shards)]
    parts = [jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for start in starts]
    return jnp.concatenate(parts, axis=1)


def own_first(x: jax.Array) -> jax.Array:
    """[., S, ...] in the order of the sequence, to the one that `project` makes."""
    size = x.shape[1] // jax.lax.axis_size("sp")
    return jnp.roll(x, -jax.lax.axis_index("sp") * size, axis=1)


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, index, keepdims=False)


def _from_shard_before(x: jax.Array, places: int) -> jax.Array:
    """x of the shard so many places before this one along sp."""
    shards = jax.lax.axis_size("sp")
    if places == 0:
        return x
    return jax.lax.ppermute(x, "sp", [(i, (i + places) % shards) for i in range(shards)])


def project_tpu(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    """As `project`, but [b, shards, R, s], the tokens of each shard in its order."""
    out = jnp.einsum("oi,bis->bos", weight, x)
    out = out if bias is None else out + bias[:, None]
    return _all_to_all(out.reshape(out.shape[0], jax.lax.axis_size("sp"), -1, out.shape[-1]))


def project_out_tpu(x: jax.Array, weight: jax.Array) -> jax.Array:
    """As `project_out`, of x [b, shards, R, s]."""
    x = _all_to_all(x)
    return jnp.einsum("bis,oi->bso", x.reshape(x.shape[0], -1, x.shape[-1]), weight)


def _all_to_all(x: jax.Array) -> jax.Array:
    """All-to-all over sp along axis 1, which has one entry a shard."""
    # XLA's CPU backend keeps a collective among one device, a copy.
    return x if jax.lax.axis_size("sp") == 1 else jax.lax.all_to_all(x, "sp", 1, 1, tiled=True)
