"""The layers for TPU, their kernels interpreted on the CPU, against the layers for GPU and CPU.

Both compute in float32 and differ in the order of sums of a few thousand products: 2e-5 of the
largest value.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from cogvideox.vae.layers import (
    ConvWeights,
    DownsampleWeights,
    Features,
    NormWeights,
    ResnetWeights,
    UpsampleWeights,
)
from cogvideox.vae.sharding import WidthShards
from cogvideox.vae.tpu.layers import TpuLayers
from cogvideox.vae.xla.layers import XlaLayers, with_neighbours

TOLERANCE = 2e-5
LATENT, GROUPS, HEIGHT = 16, 4, 8
COLUMNS = P(None, None, "width")


class Random:
    """Arrays of order 1, the same on every run."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def array(self, *shape: int) -> jax.Array:
        return jnp.asarray(self.generator.standard_normal(shape), jnp.float32)

    def conv(self, rows: int, columns: int, out_channels: int) -> ConvWeights:
        return ConvWeights(self.array(rows, columns) / rows**0.5, self.array(out_channels))

    def norm(self, channels: int) -> NormWeights:
        vectors = self.array(channels), self.array(channels)
        return NormWeights(*vectors, *(self.conv(LATENT, channels, channels) for _ in range(2)))

    def causal(self, channels: int, out_channels: int) -> ConvWeights:
        return self.conv(9 * channels, 3 * out_channels, out_channels)


def compare(compute, caches, arrays, devices: int, width: int) -> None:
    """`compute(layers, caches, *arrays)` with both layers.

    Arrays [B, T, W, ...] are split by columns, as are caches, which come and go as `TpuLayers`
    keeps them.
    """
    mesh = Mesh(np.array(jax.devices()[:devices]), ("width",))
    shards = WidthShards("width", devices, width)

    def by_frames(cache):
        frames = (with_neighbours(cache[:, t : t + 1], shards) for t in range(2))
        return None if cache is None else tuple(frames)

    def by_columns(cache):
        frames = jnp.concatenate(cache, axis=1)
        return frames if devices == 1 else frames[:, :, 1:-1]

    def comparable(x):
        # What padded columns hold is nobody's business, and sums are each device's own.
        if x.ndim == 5:
            return shards.keep_real(x, axis=2)
        return jax.lax.psum(x, "width")[:, :, None]

    def both(caches, *arrays):
        expected, kept = compute(XlaLayers(shards, GROUPS), map(by_frames, caches), *arrays)
        expected = expected, [by_columns(cache) for cache in kept]
        got, kept = compute(TpuLayers(shards, GROUPS, interpret=True), caches, *arrays)
        return jax.tree.map(comparable, [expected, (got, list(kept))])

    run = jax.shard_map(both, mesh=mesh, in_specs=COLUMNS, out_specs=COLUMNS, check_vma=False)
    expected, got = jax.jit(run)(caches, *arrays)
    assert jax.tree.structure(expected) == jax.tree.structure(got)
    for mine, reference in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        largest = float(jnp.abs(reference).max())
        np.testing.assert_allclose(mine, reference, atol=TOLERANCE * largest, rtol=0)


@pytest.mark.parametrize(
    ("devices", "width", "latent_frames", "repeat", "cached", "batch", "upsampled"),
    [
        pytest.param(1, 2, 2, 1, True, 1, False, id="later batch, upsampled, shortcut"),
        pytest.param(1, 2, 3, 1, False, 1, True, id="first batch, odd frames, doubled"),
        pytest.param(4, 6, 2, 2, True, 2, None, id="two videos, one device all padding"),
        pytest.param(4, 5, 1, 1, False, 1, True, id="one frame, upsampled, padded columns"),
    ],
)
def test_resnet(devices, width, latent_frames, repeat, cached, batch, upsampled):
    random = Random()
    shards = WidthShards("width", devices, width)
    first = latent_frames % 2 if latent_frames > 1 else 0
    stored = first + (latent_frames - first) * repeat
    channels, out_channels = 128, 256 if upsampled is False else 128
    upsample, scale = None, 1
    if upsampled is not None:
        upsample = UpsampleWeights(
            ConvWeights(random.array(2, 2 * channels, 4 * channels) / 16, random.array(channels)),
            upsampled,
        )
        scale = 2
    x = random.array(batch, stored, shards.padded_width, HEIGHT, channels)
    z = random.array(batch, latent_frames, shards.padded_width, HEIGHT, LATENT)
    shortcut = None
    if channels != out_channels:
        shortcut = random.conv(channels, out_channels, out_channels)
    weights = ResnetWeights(
        random.norm(channels),
        random.causal(channels, out_channels),
        random.norm(out_channels),
        random.causal(out_channels, out_channels),
        shortcut,
    )
    columns = shards.padded_width * scale
    caches = [None, None]
    if cached:
        real = (jnp.arange(columns) < width * scale)[:, None, None]
        caches = [
            jnp.where(real, random.array(batch, 2, columns, HEIGHT * scale, c), 0)
            for c in (channels, out_channels)
        ]

    def compute(layers, caches, x, z):
        kept = layers.shards.keep_real(x, axis=2)
        sums = jnp.stack([kept.sum((1, 2, 3)), jnp.square(kept).sum((1, 2, 3))], axis=1)
        return layers.resnet(Features(x, sums), z, weights, tuple(caches), upsample)

    compare(compute, caches, (x, z), devices, width)


@pytest.mark.parametrize("cached", [False, True])
def test_first_and_last_convolution(cached):
    random = Random()
    devices, width, frames = 2, 3, 2
    shards = WidthShards("width", devices, width)
    z = random.array(1, frames, shards.padded_width, HEIGHT, LATENT)
    real = (jnp.arange(shards.padded_width) < width)[:, None, None]
    caches = [None, None]
    if cached:
        caches = [
            jnp.where(real, random.array(1, 2, shards.padded_width, HEIGHT, c), 0)
            for c in (LATENT, 128)
        ]
    first, norm, last = random.causal(LATENT, 128), random.norm(128), random.causal(128, 3)

    def compute(layers, caches, z):
        first_cache, last_cache = caches
        features, first_cache = layers.first_conv(z, first, first_cache)
        planes, last_cache = layers.last_conv(features, z, norm, last, last_cache)
        return (features, planes), (first_cache, last_cache)

    compare(compute, caches, (z,), devices, width)


def test_layers_of_the_encoder():
    """Group norms, halving in time and space, and a last convolution that is not planar."""
    random = Random()
    devices, width, frames = 2, 3, 3
    shards = WidthShards("width", devices, width)
    columns = 2 * shards.padded_width
    x = random.array(1, frames, columns, HEIGHT, 128)
    norms = [NormWeights(random.array(128), random.array(128), eps=0.1) for _ in range(3)]
    convs = random.causal(128, 128), random.causal(128, 128)
    weights = ResnetWeights(norms[0], convs[0], norms[1], convs[1], None)
    down = DownsampleWeights(
        ConvWeights(random.array(3, 3, 128, 128) / 34, random.array(128)), True
    )
    last = random.causal(128, 32)
    caches = [
        jnp.where(
            (jnp.arange(n * shards.padded_width) < n * width)[:, None, None],
            random.array(1, 2, n * shards.padded_width, n * HEIGHT // 2, 128),
            0,
        )
        for n in (2, 2, 1)
    ]

    def compute(layers, caches, x):
        *resnet, out_cache = caches
        kept = layers.shards.keep_real(x, axis=2)
        sums = jnp.stack([kept.sum((1, 2, 3)), jnp.square(kept).sum((1, 2, 3))], axis=1)
        features, resnet = layers.resnet(Features(x, sums), None, weights, tuple(resnet))
        halved = layers.downsample(features.x, down)
        moments, out_cache = layers.last_conv(halved, None, norms[2], last, out_cache, planar=False)
        return (features, halved, moments), (*resnet, out_cache)

    compare(compute, caches, (x,), devices, width)
