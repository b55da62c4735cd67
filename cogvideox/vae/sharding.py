"""Sharding of the frames' width over the devices of a mesh.

Everything here runs inside `jax.shard_map` over one mesh axis that splits the width. Arrays are
channels-last with the width before the height, [B, T, W, H, C]. So the columns that a convolution
reads from its neighbours are contiguous, and the height, which is not split, is the innermost
spatial axis.

If the width is not divisible by the devices, it is padded on the right to equal shards. Between
layers, padded columns may have any finite value. Operations that read other columns (convolutions,
group statistics) mask them.

Axis letters: B batch, T latent frames, F frames, W H width and height, C channels, Z latent
channels, s pixels per latent.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class WidthShards:
    """Split of the columns of the latents over a mesh axis.

    Attributes:
        axis: name of the mesh axis inside `jax.shard_map`.
        count: devices on that axis.
        width: real columns of the latents, over all devices.
    """

    axis: str
    count: int
    width: int

    @property
    def local_width(self) -> int:
        """Latent columns on each device, padding included."""
        return -(-self.width // self.count)

    @property
    def padded_width(self) -> int:
        """Latent columns over all devices, padding included."""
        return self.local_width * self.count

    def real_columns(self, columns: int) -> jax.Array:
        """Returns how many of this device's columns are real: int32 scalar.

        Args:
            columns: number of columns on this device, a multiple of `local_width`.
        """
        scale = columns // self.local_width
        before = lax.axis_index(self.axis) * columns
        return jnp.clip(self.width * scale - before, 0, columns).astype(jnp.int32)

    def keep_real(self, x: jax.Array, axis: int) -> jax.Array:
        """Returns `x` with the padded columns along `axis` set to zero."""
        if self.padded_width == self.width:
            return x
        columns = x.shape[axis]
        real = jnp.arange(columns) < self.real_columns(columns)
        return jnp.where(real.reshape(-1, *(1,) * (x.ndim - axis - 1)), x, 0)

    def neighbours(self, edges: jax.Array, columns: int) -> tuple[jax.Array, jax.Array]:
        """Fetches the columns left and right of this device's columns: [B, F, 1, ...] each.

        Columns that are padding or outside the frame are zero.

        Args:
            edges: this device's first and last column; see `edges`.
            columns: number of columns on this device, a multiple of `local_width`.
        """
        if self.count == 1:
            zeros = jnp.zeros_like(edges[:, :, :1])
            return zeros, zeros
        real = self.real_columns(columns)
        own = jnp.stack([real > 0, real == columns]).reshape(2, *(1,) * (edges.ndim - 3))
        edges = jnp.where(own, edges, 0)
        to_right = [(i, i + 1) for i in range(self.count - 1)]
        to_left = [(i + 1, i) for i in range(self.count - 1)]
        return (
            lax.ppermute(edges[:, :, 1:], self.axis, to_right),
            lax.ppermute(edges[:, :, :1], self.axis, to_left),
        )


def edges(x: jax.Array) -> jax.Array:
    """Returns the first and the last column of [B, F, W, ...]: [B, F, 2, ...]."""
    return jnp.concatenate([x[:, :, :1], x[:, :, -1:]], axis=2)
