"""Details of image-to-video and video-to-video that are easy to miss, one test each."""

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from cogvideox.denoising.conditioning import Conditioning
from cogvideox.denoising.noise import NoiseSource
from cogvideox.denoising.scheduler import make_schedule
from cogvideox.model.config import SchedulerConfig, TransformerConfig, VaeConfig
from cogvideox.model.folder import find_model, stored_tensors
from cogvideox.model.presets import preset_for
from cogvideox.model.settings import DenoisingSettings, LatentShape, decoded_frames, encoded_frames
from cogvideox.transformer.ofs import ofs_embedding
from cogvideox.video.inputs import fitted
from tests.tiny_models import save_tiny_model

I2V = {"in_channels": 32, "num_layers": 42, "num_attention_heads": 48}


def settings(steps: int, strength: float | None, scheduler: str = "dpm") -> DenoisingSettings:
    return DenoisingSettings(48, 80, 16, 16, steps, 6.0, True, scheduler, 0, strength)


def test_strength_cuts_the_product_off():
    assert settings(50, 0.58).executed_steps == 28  # 50 * 0.58 is 28.999999999999996
    assert settings(50, 1.0).executed_steps == 50
    assert settings(4, 0.2).executed_steps == 0


def test_the_first_step_that_runs_draws_once_and_guidance_counts_the_steps_that_run():
    config = SchedulerConfig(timestep_spacing="trailing", prediction_type="v_prediction")
    schedule, whole = (make_schedule(settings(5, s), config) for s in (0.6, None))
    assert schedule.timesteps == whole.timesteps[2:]
    assert schedule.noise_draws == (1, 2, 1) and whole.noise_draws == (1, 2, 2, 2, 1)
    assert schedule.coefficients[1:] == whole.coefficients[3:]
    assert schedule.guidance_scales != whole.guidance_scales[2:]
    assert whole.start_alpha is None and schedule.start_alpha is not None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "kind", [diffusers.CogVideoXDPMScheduler, diffusers.CogVideoXDDIMScheduler]
)
def test_noise_is_added_in_the_dtype_of_the_run(kind, dtype):
    theirs = kind(timestep_spacing="trailing", rescale_betas_zero_snr=True)
    theirs.set_timesteps(5)
    config = SchedulerConfig(timestep_spacing="trailing", rescale_betas_zero_snr=True)
    schedule = make_schedule(settings(5, 0.6), config)
    random = np.random.default_rng(0)
    mean, std = (random.random((1, 3, 2, 4, 5)).astype(jnp.dtype(dtype)) for _ in range(2))
    shape = LatentShape(1, 2, 3, 4, 5)
    conditioning = Conditioning.of("video", mean, std, VaeConfig(invert_scale_latents=True))
    before = conditioning.draws(1)
    draws = NoiseSource().draw(7, shape.sizes, jnp.dtype(dtype), (), before)
    found = conditioning.start(draws, shape, schedule)

    generator, torch_dtype = torch.Generator().manual_seed(7), getattr(torch, dtype)
    mean, std = (torch.from_numpy(x.astype(np.float32)).to(torch_dtype) for x in (mean, std))
    sample = mean + std * torch.randn(mean.shape, generator=generator, dtype=torch_dtype)
    noise = torch.randn(shape.sizes, generator=generator, dtype=torch_dtype)
    sample = VaeConfig().scaling_factor * sample.permute(0, 2, 1, 3, 4)
    expected = theirs.add_noise(sample, noise, theirs.timesteps[2:3])
    np.testing.assert_allclose(
        found.latents.astype(np.float32), expected.float().numpy(), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(("inverted", "scale"), [(True, 1 / 0.7), (False, 0.7)])
def test_the_image_is_the_first_latent_frame_of_every_video(inverted, scale):
    mean, std = np.ones((1, 3, 1, 4, 5), np.float32), np.zeros((1, 3, 1, 4, 5), np.float32)
    vae = VaeConfig(scaling_factor=0.7, invert_scale_latents=inverted)
    conditioning = Conditioning.of("image", mean, std, vae)
    shape = LatentShape(2, 4, 3, 4, 5)
    draws = NoiseSource().draw(7, shape.sizes, np.dtype("float32"), (), conditioning.draws(2))
    schedule = make_schedule(settings(5, None), SchedulerConfig())
    start = conditioning.start(draws, shape, schedule)
    assert start.image is not None
    np.testing.assert_allclose(start.image[:, 0], scale, rtol=1e-6)
    assert not start.image[:, 1:].any()
    generator = torch.Generator().manual_seed(7)
    for _ in range(2):
        torch.randn(mean.shape, generator=generator)
    np.testing.assert_array_equal(start.latents, torch.randn(shape.sizes, generator=generator))


def test_ofs_is_a_constant_of_the_bias(tmp_path):
    folder = save_tiny_model(tmp_path, image_to_video=True)
    theirs = diffusers.CogVideoXTransformer3DModel.from_pretrained(folder / "transformer")
    with torch.no_grad():
        expected = theirs.ofs_embedding(theirs.ofs_proj(torch.full((1,), 2.0)))[0]
    model = find_model(str(folder), [])
    found = ofs_embedding(model.transformer, stored_tensors(folder / "transformer"))
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


def test_frames_of_a_video():
    assert [encoded_frames(n, 4) for n in (1, 3, 4, 5, 13, 77, 80, 81)] == [
        *(1, 1, 1, 2, 4, 20, 20, 21)
    ]
    assert decoded_frames(encoded_frames(13, 4), 4) == 16
    assert encoded_frames(20, 16) == 2  # two batches: of twelve frames and of eight


@pytest.mark.parametrize(
    ("picture", "size"),
    [
        ((768, 1360), (768, 1360)),
        ((100, 100), (768, 768)),
        ((1500, 1000), (1152, 768)),
        ((10, 100), (768, 1360)),
        ((3000, 4000), (768, 1024)),
    ],
)
def test_nearest_size_of_1_5(picture, size):
    preset = preset_for(TransformerConfig(**I2V, patch_size_t=2, ofs_embed_dim=512), 8)
    assert preset.nearest_size(*picture) == size
    assert preset.takes(*size) and not preset.takes(768, 1376) and not preset.takes(752, 1360)


def test_nearest_size_of_1_0():
    preset = preset_for(TransformerConfig(**I2V), 8)
    assert preset.sizes == ((480, 720),) and preset.nearest_size(1000, 10) == (480, 720)


def test_crop_takes_the_middle_and_stretch_all():
    pixels = np.zeros((40, 100, 3), np.uint8)
    pixels[:, 30:70] = 255
    image = Image.fromarray(pixels)
    cropped = fitted(image, 20, 20, "crop")  # the filter reads a little beyond the edges
    assert cropped[:, 3:-3].min() == 255 and cropped.min() > 100
    stretched = fitted(image, 20, 20, "stretch")
    np.testing.assert_array_equal(stretched, image.resize((20, 20), Image.Resampling.LANCZOS))
    assert stretched.min() == 0
