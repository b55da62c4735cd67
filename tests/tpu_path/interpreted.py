"""Put the TPU backend and layers, interpreted, where a stage chooses its own."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

import cogvideox.transformer.backends as backends
import cogvideox.vae.decode as decode
from cogvideox.transformer.backends import TpuBackend
from cogvideox.vae.tpu.kernels import LANES
from cogvideox.vae.tpu.layers import ColumnLayers
from cogvideox.vae.xla.layers import FrameLayers


def pack_elementwise(xs: list[jax.Array], *, packed_dtype: jnp.dtype) -> jax.Array:
    """`pltpu.pack_elementwise` of float32 to bfloat16, which has no rule on a CPU.

    The first array takes the low half of each 32-bit word, the second the high half.
    """
    low, high = (
        jax.lax.bitcast_convert_type(x.astype(packed_dtype), jnp.uint16).astype(jnp.uint32)
        for x in xs
    )
    return low | (high << 16)


def _layers(decoder: decode.Decoder, shards: decode.WidthShards) -> ColumnLayers | FrameLayers:
    """The layers that `decoder` would take on a TPU, interpreted."""
    groups = decoder.config.norm_num_groups
    whole_lanes = all(c % LANES == 0 for c in decoder.config.block_out_channels)
    if whole_lanes and decoder.dtype == jnp.bfloat16:
        return ColumnLayers(shards, groups, interpret=True)
    return FrameLayers(shards, groups)


@contextlib.contextmanager
def tpu_path() -> Iterator[None]:
    """Inside, a stage runs with the TPU code path, interpreted."""
    with (
        mock.patch.object(pltpu, "pack_elementwise", pack_elementwise),
        mock.patch.object(backends, "choose_backend", lambda *_: TpuBackend(interpret=True)),
        mock.patch.object(decode.Decoder, "_layers", _layers),
    ):
        yield
