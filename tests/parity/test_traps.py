"""Tests of details that are easy to get slightly wrong, one test for each."""

import collections
import dataclasses
import inspect
import math
import sys
from pathlib import Path

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from diffusers.utils.torch_utils import randn_tensor

from cogvideox.denoising import scheduler
from cogvideox.denoising.noise import NoiseSource
from cogvideox.model import presets
from cogvideox.model.config import SchedulerConfig, TransformerConfig, VaeConfig
from cogvideox.model.folder import find_model
from cogvideox.model.settings import DenoisingSettings, LatentShape, decoded_frames, latent_shape
from cogvideox.text.encoder import encode, load_text_encoder
from cogvideox.transformer import tokens
from tests.tiny_models import save_tiny_model

CONFIG = SchedulerConfig(
    beta_schedule="scaled_linear",
    prediction_type="v_prediction",
    rescale_betas_zero_snr=True,
    snr_shift_scale=1.0,
    timestep_spacing="trailing",
)


def settings(**changes) -> DenoisingSettings:
    values = dict(
        height=48, width=80, num_frames=9, fps=16, num_inference_steps=50, guidance_scale=6.0,
        use_dynamic_cfg=False, scheduler="dpm", seed=0,
    )  # fmt: skip
    return DenoisingSettings(**values | changes)


@pytest.mark.parametrize("steps", [50, 48, 25, 10])
def test_dynamic_guidance_is_float64(steps):
    schedule = scheduler.make_schedule(
        settings(use_dynamic_cfg=True, num_inference_steps=steps), CONFIG
    )
    # The pipeline's expression; its argument reaches 1e7 rad.
    expected = [
        1 + 6.0 * ((1 - math.cos(math.pi * ((steps - t) / steps) ** 5.0)) / 2)
        for t in schedule.timesteps
    ]
    assert list(schedule.guidance_scales) == expected
    in_float32 = [
        1 + 3 * (1 - np.cos(np.float32(math.pi) * np.float32((steps - t) / steps) ** 5))
        for t in schedule.timesteps
    ]
    assert np.abs(np.subtract(in_float32, expected)).max() > 0.1  # why it matters


@pytest.mark.parametrize("name", ["dpm", "ddim"])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon", "sample"])
@pytest.mark.parametrize("steps", [50, 48, 25, 10, 3, 1])
def test_steps_and_noise_equal_diffusers(name, prediction_type, steps):
    """Same coefficients and the same draws in the same order, whatever the step count."""
    # epsilon divides by sqrt(alpha), which zero terminal SNR makes 0.
    config = dataclasses.replace(
        CONFIG,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=prediction_type != "epsilon",
    )
    _compare_with_diffusers(name, config, steps)


@pytest.mark.parametrize("name", ["dpm", "ddim"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"timestep_spacing": "linspace", "set_alpha_to_one": False},
        {"beta_schedule": "linear", "steps_offset": 1},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 500},
        {"trained_betas": tuple(0.001 * i for i in range(1, 101)), "num_train_timesteps": 100},
    ],
)
def test_other_schedules_equal_diffusers(name, config):
    _compare_with_diffusers(name, SchedulerConfig(**config), steps=7)


def _compare_with_diffusers(name, config, steps):
    schedule = scheduler.make_schedule(settings(scheduler=name, num_inference_steps=steps), config)
    values = dataclasses.asdict(config)
    del values["name"]
    theirs = getattr(diffusers, f"CogVideoX{name.upper()}Scheduler").from_config(values)
    theirs.set_timesteps(steps)
    shape = (1, 4, 2, 3, 5)
    generator = torch.Generator().manual_seed(9)
    noises = NoiseSource().draw(9, shape, np.dtype("float32"), schedule.noise_draws)
    sample, ours = randn_tensor(shape, generator=generator), next(noises)
    np.testing.assert_array_equal(ours, sample.numpy())
    old_x0, our_x0 = None, np.zeros(shape, np.float32)
    for i, t in enumerate(theirs.timesteps):
        output = torch.sin(3 * sample + i)
        if name == "dpm":
            back = theirs.timesteps[i - 1] if i else None
            sample, old_x0 = theirs.step(output, old_x0, t, back, sample, generator=generator)
        else:
            sample = theirs.step(output, t, sample).prev_sample
        weights, noise = schedule.coefficients[i], next(noises)
        ours, our_x0 = scheduler.step(jnp.asarray(ours), output.numpy(), our_x0, noise, weights)
    # Rounding of float32 sums whose terms reach ten times the result.
    np.testing.assert_allclose(ours, sample, rtol=0, atol=1e-5 * sample.abs().max().item())


def test_dpm_draws_noise_twice_in_middle_steps():
    for steps, last in ((50, 1), (48, 2), (25, 1), (10, 1)):
        schedule = scheduler.make_schedule(settings(num_inference_steps=steps), CONFIG)
        assert schedule.noise_draws == (1, *[2] * (steps - 2), last)


def test_bfloat16_noise_is_drawn_in_bfloat16():
    drawn = next(NoiseSource().draw(1, (1, 2, 3, 4, 5), jnp.dtype("bfloat16"), ()))
    expected = torch.randn(
        (1, 2, 3, 4, 5), generator=torch.Generator().manual_seed(1), dtype=torch.bfloat16
    )
    np.testing.assert_array_equal(drawn.astype(np.float32), expected.float().numpy())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_another_process_draws_the_same_noise(dtype, monkeypatch):
    request = (3, (1, 2, 3, 4, 5), jnp.dtype(dtype), (1, 2, 0, 1))
    here = list(NoiseSource().draw(*request))
    monkeypatch.delitem(sys.modules, "torch")
    with NoiseSource() as source:
        monkeypatch.undo()
        assert source._process is not None
        elsewhere = list(source.draw(*request))
    assert len(here) == len(elsewhere) == 5 and not here[3].any()
    for ours, theirs in zip(elsewhere, here, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert (ours.dtype, ours.shape) == (request[2], request[1])


def test_noise_of_a_process_that_has_ended_is_an_error(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    with NoiseSource() as source:
        monkeypatch.undo()
        # More than a pipe holds.
        values = source.draw(3, (1 << 20,), np.dtype("float32"), (1, 1))
        next(values)
        source._process.kill()
        with pytest.raises(RuntimeError, match="draws noise ended with code -9"):
            collections.deque(values)


@pytest.mark.parametrize(
    ("generation", "num_frames", "frames", "padding"),
    [("1.5", 9, 4, 1), ("1.5", 81, 22, 1), ("1.5", 13, 4, 0), ("1.0-rope", 49, 13, 0)],
)
def test_frames_are_padded_to_whole_patches(generation, num_frames, frames, padding, tmp_path):
    model = find_model(str(save_tiny_model(tmp_path, generation)), ["transformer"])
    shape, padded = latent_shape(settings(num_frames=num_frames), model, batch=1)
    assert (shape.frames, padded) == (frames, padding)


@pytest.mark.parametrize("sample", [(96, 170), (300, 300)])
def test_slice_positions_ignore_the_configs_sample_size(sample):
    config = TransformerConfig(
        use_rotary_positional_embeddings=True,
        patch_size=2,
        patch_size_t=2,
        attention_head_dim=64,
        sample_height=sample[0],
        sample_width=sample[1],
    )
    layout = tokens.TokenLayout(LatentShape(1, 6, 16, 8, 10), 2, 2, text=7, padded=70)
    cos, sin = (table[:, :67] for table in tokens.positions(config, layout, {})["rotary"])
    theirs = diffusers.models.embeddings.get_3d_rotary_pos_embed(
        64, None, (4, 5), 3, grid_type="slice", max_size=(sample[0] // 2, sample[1] // 2)
    )
    for ours, table in zip((cos, sin), theirs, strict=True):
        # The same angles; numpy's cosines and torch's differ in the last bit.
        np.testing.assert_allclose(np.repeat(ours[:, 7:].T, 2, axis=1), table, rtol=0, atol=6e-8)
    # The text does not rotate.
    assert (cos[:, :7] == 1).all() and (sin[:, :7] == 0).all()


def test_long_prompts_are_cut_and_the_lost_words_told(tmp_path):
    model = find_model(str(save_tiny_model(tmp_path)), ["tokenizer", "text_encoder"])
    text_encoder = load_text_encoder(model, torch.float32)
    _, dropped = encode(text_encoder, ["red cat and dog", "red cat"], max_sequence_length=9)
    assert dropped == ["and dog", ""]


def test_frames_of_even_and_odd_latents():
    assert [decoded_frames(n, 4) for n in (1, 2, 3, 4, 21)] == [1, 8, 9, 16, 81]


def test_presets_of_the_published_models():
    published = {
        ("CogVideoX1.5-5B", (768, 1360), 81, 16): (42, 48, 2),
        ("CogVideoX-5b", (480, 720), 49, 8): (42, 48, None),
        ("CogVideoX-2b", (480, 720), 49, 8): (30, 30, None),
    }
    for expected, (layers, heads, patch_size_t) in published.items():
        config = TransformerConfig(
            num_layers=layers, num_attention_heads=heads, patch_size_t=patch_size_t
        )
        preset = presets.preset_for(config, 8)
        assert (preset.name, preset.sizes[0], preset.num_frames, preset.fps) == expected


def test_vae_scaling_is_the_configs(tmp_path: Path):
    for generation, factor in (("1.5", 0.7), ("1.0-rope", 1.15258426)):
        folder = save_tiny_model(tmp_path / generation, generation)
        assert VaeConfig.from_file(folder / "vae" / "config.json").scaling_factor == factor


@pytest.mark.parametrize("config", [TransformerConfig, VaeConfig, SchedulerConfig])
def test_defaults_are_diffusers(config):
    for name in config.classes:
        parameters = dict(inspect.signature(getattr(diffusers, name).__init__).parameters)
        del parameters["self"]
        theirs = {key: parameter.default for key, parameter in parameters.items()}
        ours = dataclasses.asdict(config())
        ours.pop("name", None)
        # Decoding needs only a part of the VAE's.
        assert ours.keys() == theirs.keys() or config is VaeConfig
        assert ours == {key: theirs[key] for key in ours}


@pytest.mark.parametrize("size", [(6, 8, 10), (4, 20, 6), (2, 6, 24)])
def test_positions_of_1_0_equal_diffusers(size):
    """Rotary tables cropped from a grid of 15 x 20, and the sincos embedding."""
    frames, height, width = size
    layout = tokens.TokenLayout(LatentShape(1, frames, 16, 2 * height, 2 * width), 2, 1, 5, 0)
    layout = dataclasses.replace(layout, padded=layout.tokens + 3)
    config = TransformerConfig(sample_height=30, sample_width=40)
    rotary = dataclasses.replace(config, use_rotary_positional_embeddings=True)
    crop = get_resize_crop_region_for_grid((height, width), 20, 15)
    theirs = diffusers.models.embeddings.get_3d_rotary_pos_embed(64, crop, (height, width), frames)
    for ours, table in zip(tokens.positions(rotary, layout, {})["rotary"], theirs, strict=True):
        # Angles of up to 24 rad are rounded to 2e-6.
        ours = np.repeat(ours[:, 5:-3].T, 2, axis=1)
        np.testing.assert_allclose(ours, table, rtol=0, atol=2e-6)
    theirs = diffusers.models.embeddings.get_3d_sincos_pos_embed(
        1920, (width, height), frames, 1.875
    )
    ours = tokens.positions(config, layout, {})["embedding"]
    assert not ours[:5].any() and not ours[-3:].any()
    # Both in float64 and then rounded.
    np.testing.assert_allclose(ours[5:-3], theirs.flatten(0, 1), rtol=0, atol=1e-7)
