"""Both encoders against diffusers' AutoencoderKLCogVideoX, in float32, on one device and on eight.

Tolerance: both sides do the same float32 arithmetic in another order. Means of the tiny models are
of order 1 and differ by at most 4e-6; 2e-5 leaves room for other CPUs.
"""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cogvideox.vae.encode import load_encoder
from cogvideox.vae.encode_program import frame_batches
from tests.cogvideox.vae.vae_models import mesh_of, random_vaes

TOLERANCE = 2e-5
FLOAT32 = jnp.dtype(jnp.float32)

# Thinned from the published shape; two resnets a block, halving time in every block; with the
# convolution of the moments and another epsilon.
MODELS = {
    "four_levels": dict(
        levels=4,
        block_out_channels=(8, 8, 16, 24),
        layers_per_block=1,
        norm_num_groups=4,
        temporal_compression_ratio=4,
    ),
    "eight_frames": dict(
        levels=3,
        block_out_channels=(6, 6, 9),
        latent_channels=5,
        layers_per_block=2,
        norm_num_groups=3,
        temporal_compression_ratio=8,
    ),
    "moments_conv": dict(
        levels=2,
        block_out_channels=(4, 8),
        latent_channels=3,
        layers_per_block=1,
        norm_num_groups=2,
        norm_eps=0.03,
        temporal_compression_ratio=2,
        use_quant_conv=True,
    ),
}


def random_video(frames: int, height: int, width: int, batch: int = 1) -> np.ndarray:
    random = np.random.default_rng(frames)
    return random.integers(0, 256, (batch, frames, height, width, 3), dtype=np.uint8)


def reference(vae, video: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with torch.no_grad():
        pixels = torch.from_numpy(video).permute(0, 4, 1, 2, 3).float() / 255
        posterior = vae.encode(2 * pixels - 1).latent_dist
    return posterior.mean.numpy(), posterior.std.numpy()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return random_vaes(MODELS, tmp_path_factory)


# An image; a short batch; the remainder in the first batch, odd and even; widths that leave devices
# without columns.
@pytest.mark.parametrize(
    ("encoder", "model", "frames", "width", "devices"),
    [
        ("flax", "four_levels", 1, 24, 2),
        ("torchax", "eight_frames", 6, 8, 1),
        ("flax", "moments_conv", 17, 26, 8),
        ("torchax", "moments_conv", 1, 14, 1),
    ],
)
def test_encode_equals_diffusers(models, encoder, model, frames, width, devices):
    vae, folder = models[model]
    video = random_video(frames, 8, width, batch=2 if frames == 6 else 1)
    found = load_encoder(f"vae_encoder_{encoder}", folder, mesh_of(devices), FLOAT32).encode(video)
    for mine, theirs in zip(found, reference(vae, video), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=TOLERANCE, rtol=TOLERANCE)


def test_variances_are_limited_and_values_finite(models, tmp_path):
    vae, _ = models["moments_conv"]
    with torch.no_grad():
        vae.quant_conv.bias[3:] += torch.tensor([-90.0, 0, 90.0])
    vae.save_pretrained(tmp_path)
    with torch.no_grad():
        vae.quant_conv.bias[3:] -= torch.tensor([-90.0, 0, 90.0])
    encoder = load_encoder("vae_encoder_flax", tmp_path, mesh_of(1), FLOAT32)
    std = encoder.encode(random_video(1, 4, 4)).std
    np.testing.assert_allclose(std[:, 0], np.exp(-15), rtol=1e-6)
    np.testing.assert_allclose(std[:, 2], np.exp(10), rtol=1e-6)
    encoder.weights["quant_conv.bias"] = encoder.weights["quant_conv.bias"].at[0].set(jnp.nan)
    with pytest.raises(FloatingPointError, match="frames 0 to 0"):
        encoder.encode(random_video(1, 4, 4))


def test_frame_batches():
    assert frame_batches(1) == [(0, 1)]
    assert frame_batches(7) == [(0, 7)]
    assert frame_batches(8) == [(0, 8)]
    assert frame_batches(9) == [(0, 9)]
    assert frame_batches(15) == [(0, 15)]
    assert frame_batches(25) == [(0, 9), (9, 17), (17, 25)]
