"""The TPU kernel, interpreted on the CPU, against the frame-by-frame form of the same operation.

Both compute in float32 and differ in the order of 27 C products: 1e-5 of values of order 1.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from cogvideox import vae_ops

C, OUT, GROUPS, LATENT, HEIGHT = 128, 256, 4, 3, 16


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize(
    ("devices", "width", "frames", "cached", "out_channels", "batch"),
    [
        pytest.param(1, 3, 4, True, OUT, 1, id="later batch"),
        pytest.param(1, 3, 5, False, OUT, 1, id="first batch, odd frames"),
        pytest.param(4, 6, 2, True, C, 2, id="two per device, one device all padding, two videos"),
        pytest.param(4, 5, 3, False, 3, 1, id="last convolution, padded columns"),
    ],
)
def test_kernel_equals_frame_by_frame(devices, width, frames, cached, out_channels, batch):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("width",))
    shards = vae_ops.WidthShards("width", devices, width, "cpu")
    scale, latent_frames = 2, (frames + 1) // 2
    columns = shards.padded_width * scale
    x = normal(0, batch, frames, columns, HEIGHT, C)
    z = normal(1, batch, latent_frames, shards.padded_width, HEIGHT // scale, LATENT)
    cache = normal(2, batch, 2, columns, HEIGHT, C)
    # A cache never holds anything in padded columns.
    cache = cache.at[:, :, width * scale :].set(0) if cached else None
    residual = normal(3, batch, frames, columns, HEIGHT, out_channels)
    norm = vae_ops.Norm(
        normal(4, C),
        normal(5, C),
        vae_ops.Conv(normal(6, LATENT, C), normal(7, C)),
        vae_ops.Conv(normal(8, LATENT, C), normal(9, C)),
    )
    conv = vae_ops.Conv(normal(10, 3, 3, 3, C, out_channels) / 60, normal(11, out_channels))

    def both(x, z, cache, residual):
        video = vae_ops.Video(x, None, shards)
        added = vae_ops.Residual(vae_ops.Video(residual, None, shards), None)
        modulation = vae_ops.modulation(video.sums(), x.shape, z, norm, GROUPS, shards)
        expected = vae_ops.norm_conv_by_frames(video, *modulation, conv, cache, added, False)
        got = vae_ops.norm_conv_by_kernel(
            x, *modulation, conv, cache, added, shards, interpret=True
        )
        return [
            (
                shards.keep_real(out, axis=2),
                shards.keep_real(new_cache, axis=2),
                jax.lax.psum(sums, "width"),
            )
            for out, new_cache, sums in (expected, got)
        ]

    split = P(None, None, "width")
    expected, got = jax.jit(
        jax.shard_map(
            both,
            mesh=mesh,
            in_specs=split,
            out_specs=[(split, split, P())] * 2,
            check_vma=False,
        )
    )(x, z, cache, residual)
    for mine, reference in zip(got, expected, strict=True):
        scale = float(jnp.abs(reference).max())
        np.testing.assert_allclose(mine, reference, atol=1e-5 * scale, rtol=0)
