"""Both decoders against diffusers' AutoencoderKLCogVideoX, in float32.

Tolerance: both sides do the same float32 arithmetic in another order. Frames in 0..1 of the tiny
models differ by at most 3e-6; 2e-5 leaves room for other CPUs and is 94 dB.
"""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from diffusers.video_processor import VideoProcessor

from cogvideox.vae.decode import load_decoder
from tests.cogvideox.vae.vae_models import mesh_of, random_vaes

TOLERANCE = 2e-5

# The published shape, thinned, and two unlike it in every number.
MODELS = {
    "four_levels": dict(
        levels=4,
        block_out_channels=(8, 16, 16, 24),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.7,
        temporal_compression_ratio=4,
    ),
    "three_levels": dict(
        levels=3,
        block_out_channels=(6, 12, 9),
        latent_channels=5,
        layers_per_block=2,
        norm_num_groups=3,
        temporal_compression_ratio=8,
    ),
    "latent_conv": dict(
        levels=2,
        block_out_channels=(4, 8),
        latent_channels=3,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=2,
        use_post_quant_conv=True,
    ),
}
# One frame; one batch, even or odd; several, even or odd: with one model and one decoder, because
# both decoders and all models go through the same batches.
CASES = [("vae_flax", "four_levels", frames) for frames in (1, 2, 3, 4, 5)]
CASES += [("vae_torchax", "four_levels", 5), ("vae_torchax", "three_levels", 3)]
CASES += [(decoder, "latent_conv", 4) for decoder in ("vae_torchax", "vae_flax")] + [
    ("vae_flax", "three_levels", 5)
]


def reference_frames(vae: AutoencoderKLCogVideoX, latents: np.ndarray) -> np.ndarray:
    """What the diffusers pipeline makes of its latents: [B, F, height, width, 3] in 0..1."""
    with torch.no_grad():
        video = vae.decode(1 / vae.config.scaling_factor * torch.from_numpy(latents)).sample
    return VideoProcessor().postprocess_video(video, output_type="np")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return random_vaes(MODELS, tmp_path_factory)


@pytest.mark.parametrize(("decoder", "model", "frames"), CASES)
def test_decode_equals_diffusers(models, decoder, model, frames):
    vae, folder = models[model]
    shape = (1, vae.config.latent_channels, frames, 4, 5)
    latents = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    ours = load_decoder(decoder, folder, mesh_of(1), jnp.float32)
    batches = list(ours.decode(latents, output="float32"))
    assert len(batches) == max(frames // 2, 1)
    np.testing.assert_allclose(
        np.concatenate(batches, axis=1), reference_frames(vae, latents), atol=TOLERANCE, rtol=0
    )


def test_uint8_frames_are_those_of_diffusers(models):
    vae, folder = models["four_levels"]
    latents = np.random.default_rng(2).standard_normal((2, 16, 1, 3, 4)).astype(np.float32)
    decoder = load_decoder("vae_flax", folder, mesh_of(1), jnp.float32)
    (frames,) = decoder.decode(latents, output="uint8")
    expected = (reference_frames(vae, latents) * 255).round().astype(np.uint8)
    assert frames.dtype == np.uint8
    # A value within rounding of k + 1/2 may fall to either side.
    different = frames != expected
    assert different.mean() < 1e-3
    assert np.abs(frames.astype(int) - expected)[different].max(initial=0) <= 1
