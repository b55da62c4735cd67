"""Both decoders against diffusers' AutoencoderKLCogVideoX, in float32.

Tolerance: both sides do the same float32 arithmetic in another order. Frames in 0..1 of the tiny
models differ by at most 3e-6; 2e-5 leaves room for other CPUs and is 94 dB.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from diffusers.video_processor import VideoProcessor
from jax.sharding import Mesh

from cogvideox import vae_flax, vae_torchax

TOLERANCE = 2e-5
DECODERS = {"torchax": vae_torchax, "flax": vae_flax}

# Two generations of the published shape, thinned, and one unlike them in every number.
MODELS = {
    "four_levels": dict(
        block_out_channels=(8, 16, 16, 24),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.7,
        temporal_compression_ratio=4,
    ),
    "three_levels": dict(
        block_out_channels=(6, 12, 9),
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        latent_channels=5,
        layers_per_block=2,
        norm_num_groups=3,
        temporal_compression_ratio=8,
    ),
    "latent_conv": dict(
        block_out_channels=(4, 8),
        up_block_types=("CogVideoXUpBlock3D",) * 2,
        down_block_types=("CogVideoXDownBlock3D",) * 2,
        out_channels=3,
        latent_channels=3,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=2,
        use_post_quant_conv=True,
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def reference(request, tmp_path_factory):
    """A random diffusers VAE whose every weight matters, and its folder."""
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(**MODELS[request.param]).eval()
    with torch.no_grad():
        for name, p in vae.named_parameters():
            # Biases and norm weights start at 0 and 1, which would hide a mix-up.
            p.add_(torch.randn_like(p) * (0.3 if p.ndim == 1 else 0.05))
            assert p.dtype == torch.float32, name
    folder = tmp_path_factory.mktemp(request.param)
    vae.save_pretrained(folder)
    return vae, folder


def reference_frames(vae: AutoencoderKLCogVideoX, latents: np.ndarray) -> np.ndarray:
    """What the diffusers pipeline makes of its latents: [B, F, height, width, 3] in 0..1."""
    with torch.no_grad():
        video = vae.decode(torch.from_numpy(latents) / vae.config.scaling_factor).sample
    return VideoProcessor().postprocess_video(video, output_type="np")


def random_latents(vae: AutoencoderKLCogVideoX, *shape: int, batch: int = 1) -> np.ndarray:
    channels = vae.config.latent_channels
    return np.random.default_rng(1).standard_normal((batch, channels, *shape)).astype(np.float32)


def mesh_of(devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:devices]).reshape(1, devices), ("dp", "tp"))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("frames", [1, 2, 3, 5, 6])
def test_every_frame_count_equals_diffusers(reference, decoder, frames):
    vae, folder = reference
    latents = random_latents(vae, frames, 4, 5)
    ours = DECODERS[decoder].load_decoder(folder, mesh_of(1), jnp.float32)
    batches = list(ours.decode(latents, output="float32"))
    assert len(batches) == max(frames // 2, 1)
    np.testing.assert_allclose(
        np.concatenate(batches, axis=1), reference_frames(vae, latents), atol=TOLERANCE, rtol=0
    )
