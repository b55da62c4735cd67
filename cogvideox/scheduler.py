"""DDIM and DPM steps of CogVideoX as one pure function of arrays, and noise in diffusers' order.

Both schedulers, for every prediction type, are linear in the sample, the model output, the last
prediction of x0 and the noise. The coefficients are computed on the host by diffusers' own
scheduler classes in their own precision (float64 for the published beta schedule), so the jitted
step holds no schedule: another step count, scheduler or prediction type compiles nothing.

Follows diffusers' schedulers/scheduling_dpm_cogvideox.py (DPM-Solver++ 2M SDE, arXiv 2211.01095,
in CogVideoX's form) and scheduling_ddim_cogvideox.py (arXiv 2010.02502).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

from cogvideox.settings import DenoisingSettings

if TYPE_CHECKING:
    import diffusers

SCHEDULERS = {"dpm": "CogVideoXDPMScheduler", "ddim": "CogVideoXDDIMScheduler"}


class StepCoefficients(NamedTuple):
    """The weights of one denoising step; float scalars, or float32 arrays [] inside jit.

    x0 = x0_sample * sample + x0_output * model_output
    next = sample * sample + x0 * x0 + previous_x0 * previous_x0 + noise * noise
    """

    x0_sample: float | jax.Array
    x0_output: float | jax.Array
    sample: float | jax.Array
    x0: float | jax.Array
    previous_x0: float | jax.Array
    noise: float | jax.Array


def step(
    sample: jax.Array,
    model_output: jax.Array,
    previous_x0: jax.Array,
    noise: jax.Array,
    weights: StepCoefficients,
) -> tuple[jax.Array, jax.Array]:
    """One denoising step, computed in float32.

    Args:
        sample: the noisy latents [B, T, C, H, W].
        model_output: the guided prediction, same shape.
        previous_x0: the last step's x0, same shape (anything finite where its weight is 0).
        noise: standard normal, same shape (anything finite where its weight is 0).

    Returns:
        The less noisy latents and the predicted x0, both float32.
    """
    sample = sample.astype(jnp.float32)
    x0 = weights.x0_sample * sample + weights.x0_output * model_output.astype(jnp.float32)
    drift = weights.sample * sample + weights.x0 * x0 + weights.previous_x0 * previous_x0
    return drift + weights.noise * noise.astype(jnp.float32), x0


@dataclasses.dataclass(frozen=True)
class Schedule:
    """All steps of one run, ready on the host."""

    timesteps: tuple[int, ...]
    guidance_scales: tuple[float, ...]
    coefficients: tuple[StepCoefficients, ...]
    noise_draws: tuple[int, ...]  # how often diffusers draws noise in each step; the last counts


def make_schedule(settings: DenoisingSettings, config: Mapping[str, Any]) -> Schedule:
    """The timesteps, guidance scales, coefficients and noise draws of a run.

    Args:
        settings: names the scheduler, a key of SCHEDULERS, the steps and the guidance.
        config: the model's scheduler_config.json, of either scheduler class.

    Raises:
        ValueError: more steps than the model was trained with, or an unknown prediction type.
    """
    import diffusers  # only here: it takes seconds

    scheduler_class = getattr(diffusers, SCHEDULERS[settings.scheduler])
    scheduler = scheduler_class.from_config(dict(config))
    scheduler.set_timesteps(settings.num_inference_steps)
    timesteps = [int(t) for t in scheduler.timesteps]
    stride = scheduler.config.num_train_timesteps // settings.num_inference_steps
    coefficients, draws = [], []
    for i, timestep in enumerate(timesteps):
        previous = timestep - stride
        alpha = scheduler.alphas_cumprod[timestep]
        alpha_next = (
            scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.final_alpha_cumprod
        )
        if settings.scheduler == "ddim":
            update, drawn = _ddim_update(alpha, alpha_next), 0
        else:
            # diffusers falls back to first order, with one draw, where it has no earlier x0 to
            # use (the first step) or steps past the end (the last one, for most step counts).
            second_order = i > 0 and previous >= 0
            alpha_back = scheduler.alphas_cumprod[timesteps[i - 1]] if i > 0 else None
            update = _dpm_update(scheduler, alpha, alpha_next, alpha_back, second_order)
            drawn = 2 if second_order else 1
        weights = (*_x0_weights(scheduler.config.prediction_type, alpha), *update)
        coefficients.append(StepCoefficients(*map(float, weights)))
        draws.append(drawn)
    scales = [_guidance_scale(settings, timestep) for timestep in timesteps]
    return Schedule(tuple(timesteps), tuple(scales), tuple(coefficients), tuple(draws))


def _x0_weights(prediction_type: str, alpha: torch.Tensor) -> tuple[Any, Any]:
    """The weights of sample and model output in the prediction of x0."""
    if prediction_type == "v_prediction":
        return alpha**0.5, -((1 - alpha) ** 0.5)
    if prediction_type == "epsilon":
        return 1 / alpha**0.5, -((1 - alpha) ** 0.5) / alpha**0.5
    if prediction_type == "sample":
        return 0.0, 1.0
    raise ValueError(f"the scheduler's prediction_type {prediction_type!r} is not known")


def _ddim_update(alpha: torch.Tensor, alpha_next: torch.Tensor) -> tuple[Any, ...]:
    sample = ((1 - alpha_next) / (1 - alpha)) ** 0.5
    return sample, alpha_next**0.5 - alpha**0.5 * sample, 0.0, 0.0


def _dpm_update(
    scheduler: diffusers.CogVideoXDPMScheduler,
    alpha: torch.Tensor,
    alpha_next: torch.Tensor,
    alpha_back: torch.Tensor | None,
    second_order: bool,
) -> tuple[Any, ...]:
    h, r, _, _ = scheduler.get_variables(alpha, alpha_next, alpha_back)
    sample, x0, *extrapolation = scheduler.get_mult(h, r, alpha, alpha_next, alpha_back)
    noise = (1 - alpha_next) ** 0.5 * (1 - (-2 * h).exp()) ** 0.5
    current, previous = extrapolation if second_order else (1.0, 0.0)
    return sample, -x0 * current, x0 * previous, noise


def _guidance_scale(settings: DenoisingSettings, timestep: int) -> float:
    """The guidance scale of a step, in float64.

    With dynamic guidance diffusers puts the timestep (0..999) where a step's number was meant, so
    the cosine's argument reaches 1e7 rad and more; float32 gives values that differ by up to 3.45
    on a scale of 1 to 7.
    """
    if not settings.use_dynamic_cfg:
        return settings.guidance_scale
    steps = settings.num_inference_steps
    phase = math.pi * ((steps - timestep) / steps) ** 5.0
    return 1 + settings.guidance_scale * ((1 - math.cos(phase)) / 2)


def draw_noise(
    seed: int, shape: tuple[int, ...], dtype: torch.dtype, schedule: Schedule
) -> Iterator[np.ndarray]:
    """Noise exactly as diffusers draws it: a CPU generator, in `dtype`, over the padded latents.

    Yields:
        The initial latents [B, T, C, H, W], then the noise of each step (zeros where the step
        adds none); the dtype is `dtype`'s numpy equivalent.
    """
    generator = torch.Generator("cpu").manual_seed(seed)

    numpy_dtype = jnp.dtype(str(dtype).removeprefix("torch."))

    def draw() -> np.ndarray:
        noise = torch.randn(shape, generator=generator, dtype=dtype)
        return noise.float().numpy().astype(numpy_dtype)

    yield draw()
    unused = np.zeros(shape, numpy_dtype)
    for count in schedule.noise_draws:
        drawn = [draw() for _ in range(count)]
        yield drawn[-1] if drawn else unused
