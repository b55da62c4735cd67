"""What the two ways of computing the decoder's layers share: the split width, weights, statistics.

Everything runs inside `jax.shard_map` over one mesh axis that splits the width. Arrays are
channels-last with the width before the height, [B, T, W, H, C]: the columns that a convolution
borrows from its neighbours are then whole contiguous slabs, and the height, which no mesh splits,
is the innermost spatial axis.

A width that the devices do not divide is padded on the right to equal shards. Padded columns may
hold any finite value between layers; what looks at more than its own column (convolutions, group
statistics) takes them out itself.

The algorithms are those of `diffusers.models.autoencoders.autoencoder_kl_cogvideox`, reordered
where the result is the same but for rounding.

Axis letters: B batch, T latent frames, F frames, W H width and height, C channels, Z latent
channels, s pixels per latent.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

NORM_EPS = 1e-6  # CogVideoXSpatialNorm3D fixes it; the config's norm_eps never reaches the decoder


class Conv(NamedTuple):
    """A convolution: its weight as `cogvideox.vae.weights.arrange` makes it, and bias [C']."""

    weight: jax.Array
    bias: jax.Array


class Norm(NamedTuple):
    """A spatial norm: scale and bias [C] of its group norm, and two 1x1x1 convolutions [Z, C]."""

    scale: jax.Array
    bias: jax.Array
    multiplier: Conv
    summand: Conv


class Resnet(NamedTuple):
    """A resnet block; `shortcut` is a 1x1x1 convolution where the channels change, else None."""

    norm1: Norm
    conv1: Conv
    norm2: Norm
    conv2: Conv
    shortcut: Conv | None


class Upsample(NamedTuple):
    """A 3x3 convolution after nearest doubling in space and, if `compress_time`, in time."""

    conv: Conv
    compress_time: bool

    def frames(self, stored: int) -> int:
        """How many frames `stored` ones become; an odd number keeps its first one single."""
        return 2 * stored - stored % 2 if self.compress_time and stored > 1 else stored


class Features(NamedTuple):
    """Activations [B, F, W, H, C], and what the norm after them needs.

    sums: float32 [B, 2, C], sum and sum of squares over frames, rows and this device's real
    columns.
    """

    x: jax.Array
    sums: jax.Array


class Layers(Protocol):
    """The decoder's layers; caches are None at the start of a video."""

    def first_conv(self, z: jax.Array, conv: Conv, cache: Any) -> tuple[Features, Any]:
        """The causal convolution of the latents [B, T, W, H, Z]."""

    def resnet(
        self,
        features: Features,
        z: jax.Array,
        weights: Resnet,
        caches: Any,
        upsample: Upsample | None = None,
    ) -> tuple[Features, Any]:
        """A resnet block, after an upsampler where it is the first of its resolution.

        Source: CogVideoXResnetBlock3D and CogVideoXUpsample3D.
        """

    def last_conv(
        self, features: Features, z: jax.Array, norm: Norm, conv: Conv, cache: Any
    ) -> tuple[jax.Array, Any]:
        """Norm, SiLU and the causal convolution to colours, as planes [B, F, W, 3, H]."""


@dataclasses.dataclass(frozen=True)
class WidthShards:
    """How the columns of the latents are split over a mesh axis.

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
        """How many of this device's `columns`, a multiple of `local_width`, are real: int32."""
        scale = columns // self.local_width
        before = lax.axis_index(self.axis) * columns
        return jnp.clip(self.width * scale - before, 0, columns).astype(jnp.int32)

    def keep_real(self, x: jax.Array, axis: int) -> jax.Array:
        """`x` with the padded columns along `axis` set to zero."""
        if self.padded_width == self.width:
            return x
        columns = x.shape[axis]
        real = jnp.arange(columns) < self.real_columns(columns)
        return jnp.where(real.reshape(-1, *(1,) * (x.ndim - axis - 1)), x, 0)

    def neighbours(self, edges: jax.Array, columns: int) -> tuple[jax.Array, jax.Array]:
        """The columns left and right of this device's: [B, F, 1, ...] each.

        They are zero where they are padding or beyond the picture.

        Args:
            edges: this device's own first and last column; see `edges`.
            columns: how many this device has, a multiple of `local_width`.
        """
        if self.count == 1:
            return (jnp.zeros_like(edges[:, :, :1]),) * 2
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
    """The first and the last column of [B, F, W, ...]: [B, F, 2, ...]."""
    return jnp.concatenate([x[:, :, :1], x[:, :, -1:]], axis=2)


def precision(dtype: jnp.dtype) -> lax.Precision:
    """TPUs and GPUs multiply float32 with fewer bits unless told otherwise."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def pointwise(x: jax.Array, conv: Conv) -> jax.Array:
    """A 1x1x1 convolution: [..., C] -> [..., C']."""
    return jnp.einsum("...i,io->...o", x, conv.weight, precision=precision(x.dtype)) + conv.bias


def frame_repeat(latent_frames: int, frames: int) -> tuple[int, int]:
    """(repeat, offset): frame t shows latent frame (t + offset) // repeat, the nearest one.

    Source: CogVideoXSpatialNorm3D.forward: an odd number of frames keeps its first one single.
    """
    if frames > 1 and frames % 2 == 1:
        repeat = (frames - 1) // (latent_frames - 1)
        return repeat, repeat - 1
    return frames // latent_frames, 0


def channel_sums(x: jax.Array, shards: WidthShards) -> jax.Array:
    """Sum and sum of squares of [B, F, W, H, C], see `Features`: float32 [B, 2, C]."""
    x = shards.keep_real(x.astype(jnp.float32), axis=2)
    return jnp.stack([x.sum(axis=(1, 2, 3)), jnp.square(x).sum(axis=(1, 2, 3))], axis=1)


def modulation(
    sums: jax.Array,
    shape: tuple[int, ...],
    z: jax.Array,
    norm: Norm,
    groups: int,
    shards: WidthShards,
) -> tuple[jax.Array, jax.Array]:
    """What a spatial norm multiplies its input by and adds to it, at the size of the latents.

    Source: CogVideoXSpatialNorm3D. There the latents are interpolated to the size of the input and
    then convolved; a 1x1x1 convolution and nearest interpolation commute, so here all but one
    multiplication and one addition happen at the size of the latents, up to 256 times fewer
    voxels. The group statistics take one pass, in float32, over all devices.

    Args:
        sums: of the input; see `Features`.
        shape: of the input on this device, [B, F, W s, H s, C].
        z: latents [B, T, W, H', Z].
        norm: the spatial norm's weights.
        groups: number of channel groups.
        shards: how the width is split.

    Returns:
        Multiplier and summand, float32 [B, T, W, H', C].
    """
    b, frames, columns, rows, channels = shape
    size = channels // groups
    real_width = shards.width * (columns // shards.local_width)
    sums = lax.psum(sums, shards.axis).reshape(b, 2, groups, size).sum(axis=3)
    moments = sums / (frames * real_width * rows * size)
    mean, mean_square = moments[:, 0], moments[:, 1]
    variance = jnp.maximum(mean_square - jnp.square(mean), 0)  # rounding can take it below zero
    gain = jnp.repeat(lax.rsqrt(variance + NORM_EPS), size, axis=1) * norm.scale
    shift = norm.bias - jnp.repeat(mean, size, axis=1) * gain  # both float32 [B, C]

    multiplier = pointwise(z, norm.multiplier).astype(jnp.float32)
    summand = pointwise(z, norm.summand).astype(jnp.float32)
    gain, shift = (v[:, None, None, None] for v in (gain, shift))
    return gain * multiplier, shift * multiplier + summand


def activate(x: jax.Array, multiplier: jax.Array, summand: jax.Array) -> jax.Array:
    """silu(x * multiplier + summand) of a frame [B, W s, H s, C], modulation [B, W, H, C]."""
    b, columns, rows, channels = x.shape
    width, height = multiplier.shape[1:3]
    blocks = x.reshape(b, width, columns // width, height, rows // height, channels)
    multiplier, summand = (v[:, :, None, :, None] for v in (multiplier, summand))
    blocks = jax.nn.silu(blocks.astype(jnp.float32) * multiplier + summand)
    return blocks.astype(x.dtype).reshape(x.shape)
