"""A device's rows of the token sequence, and the collectives over tp that a block needs.

XLA's CPU backend keeps collectives of a single device as copies; the functions skip them.
"""

import jax
import jax.numpy as jnp


def gather_over_tp(x: jax.Array, axis: int) -> jax.Array:
    """Joins the parts of an axis that the devices along tp hold."""
    return x if jax.lax.axis_size("tp") == 1 else jax.lax.all_gather(x, "tp", axis=axis, tiled=True)


def sum_over_tp(x: jax.Array) -> jax.Array:
    """Sums partial products [b, S, E] over tp; each device keeps its share of the tokens."""
    if jax.lax.axis_size("tp") == 1:
        return x
    return jax.lax.psum_scatter(x, "tp", scatter_dimension=1, tiled=True)


def row_indices(count: int) -> jax.Array:
    """Indices in the whole sequence of this device's `count` rows, [count] int32."""
    shard = jax.lax.axis_index("sp") * jax.lax.axis_size("tp") + jax.lax.axis_index("tp")
    return shard * count + jnp.arange(count)


def own_heads(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Returns the part of x [N] for the heads that this device has along `axes`, outermost first.

    Attention splits the heads over tp, and those of a device along tp over sp.
    """
    shard, shards = 0, 1
    for axis in axes:
        shard = shard * jax.lax.axis_size(axis) + jax.lax.axis_index(axis)
        shards *= jax.lax.axis_size(axis)
    count = x.shape[0] // shards
    return jax.lax.dynamic_slice_in_dim(x, shard * count, count)


def text_rows_first(text: jax.Array, video: jax.Array) -> jax.Array:
    """Returns this device's rows of the joint sequence, [b, s, E].

    Args:
        text: [b, S_text, E], all text tokens.
        video: [b, s, E], this device's rows; rows of text may hold anything.
    """
    rows = row_indices(video.shape[1])
    # Text rows from this device's first one on, padded to s rows that the mask below discards.
    follow = jnp.pad(text, ((0, 0), (0, video.shape[1]), (0, 0)))
    first = jnp.minimum(rows[0], text.shape[1])
    own = jax.lax.dynamic_slice_in_dim(follow, first, video.shape[1], axis=1)
    return jnp.where((rows < text.shape[1])[:, None], own, video)
