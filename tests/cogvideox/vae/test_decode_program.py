"""The programs of a decode: their batches, their layers, and the check for finite values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from cogvideox.model.config import VaeConfig
from cogvideox.vae.batches import AXIS
from cogvideox.vae.decode import Decoder
from cogvideox.vae.kinds import VaeKind
from cogvideox.vae.layers import DecoderCaches
from cogvideox.vae.program import DecodeProgram, choose_layers, frame_batches
from cogvideox.vae.sharding import WidthShards
from cogvideox.vae.tpu.layers import TpuLayers
from cogvideox.vae.xla.layers import XlaLayers

CONFIG = VaeConfig(
    block_out_channels=(4,),
    up_block_types=("CogVideoXUpBlock3D",),
    latent_channels=3,
    norm_num_groups=2,
    temporal_compression_ratio=1,
)


@pytest.mark.parametrize(
    ("latent_frames", "expected"),
    [
        (1, [(0, 1)]),
        (2, [(0, 2)]),
        (3, [(0, 3)]),
        (4, [(0, 2), (2, 4)]),
        (7, [(0, 3), (3, 5), (5, 7)]),
    ],
)
def test_frame_batches(latent_frames, expected):
    assert frame_batches(latent_frames) == expected


@pytest.mark.parametrize(
    ("channels", "dtype", "interpret", "expected"),
    [
        (128, jnp.bfloat16, True, TpuLayers),
        (128, jnp.float32, True, XlaLayers),
        (96, jnp.bfloat16, True, XlaLayers),
        (128, jnp.bfloat16, False, XlaLayers),  # the devices here are CPUs
    ],
)
def test_kernels_are_chosen_where_they_fit(channels, dtype, interpret, expected):
    config = VaeConfig(
        block_out_channels=(128, channels), up_block_types=("CogVideoXUpBlock3D",) * 2
    )
    mesh = Mesh(np.array(jax.devices()[:1]), (AXIS,))
    shards = WidthShards(AXIS, 1, 4)
    layers = choose_layers(config, shards, mesh, jnp.dtype(dtype), interpret)
    assert type(layers) is expected
    if isinstance(layers, TpuLayers):
        assert layers.interpret is interpret


def _pass_latents_on(config, layers):
    """A decoder without any layer, so that no value reaches another device's columns."""

    def forward(weights, latents, caches):
        return latents.swapaxes(3, 4), DecoderCaches(None, None, [], [])

    return forward


@pytest.mark.parametrize("bad", [None, *range(8)])
def test_a_value_that_is_not_finite_on_one_device_only_is_an_error(bad):
    """Group norms spread it to all devices, but the last convolution can overflow on one."""
    devices, columns = 8, 2
    kind = VaeKind("pass_latents_on", (), _pass_latents_on)
    mesh = Mesh(np.array(jax.devices()[:devices]), (AXIS,))
    decoder = Decoder(DecodeProgram(kind, CONFIG, mesh, jnp.dtype(jnp.float32)), weights={})
    decoder.program.abstract_weights.clear()
    latents = np.zeros((1, 3, 2, 4, devices * columns), np.float32)
    if bad is None:
        (frames,) = decoder.decode(latents, output="uint8")
        assert frames.shape == (1, 2, 4, devices * columns, 3)
        return
    latents[0, 1, 0, 2, bad * columns] = np.nan
    with pytest.raises(FloatingPointError, match="latent frames 0 to 1"):
        next(decoder.decode(latents, output="uint8"))
