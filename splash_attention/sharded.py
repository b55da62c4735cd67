"""Attention over a mesh: every device runs the same attention on its own batch and heads.

Axis letters: B batch, N heads, S tokens, D head size.
"""

from collections.abc import Callable

import jax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def sharded_attention(
    attention: Attention,
    mesh: Mesh | AbstractMesh,
    *,
    batch_axis: str | None = "dp",
    head_axis: str | None = "tp",
) -> Attention:
    """`attention` on global [B, N, S, D] arrays, batch over one mesh axis and heads over another.

    Args:
        attention: function of q [B, N, S, D], k and v [B, N, K, D] of one device.
        mesh: the devices; an axis it does not have counts as one of size 1.
        batch_axis: mesh axis that shards B.
        head_axis: mesh axis that shards N.

    Returns:
        A function of global q, k, v, for use inside an outer `jax.jit` on a mesh of
        Auto axes. It raises ValueError when a
        mesh axis does not divide the dimension it shards.
    """
    batch_axis, head_axis = (a if a in mesh.axis_names else None for a in (batch_axis, head_axis))
    spec = P(batch_axis, head_axis, None, None)
    # check_vma: pallas_call does not say over which mesh axes its outputs vary.
    local = jax.shard_map(
        attention, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False
    )

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        for size, axis, what in (
            (q.shape[0], batch_axis, "batch"),
            (q.shape[1], head_axis, "heads"),
        ):
            if axis is not None and size % mesh.shape[axis]:
                raise ValueError(
                    f"{what} of {size} cannot be split over mesh axis {axis!r} of size "
                    f"{mesh.shape[axis]}"
                )
        return local(q, k, v)

    return attend
