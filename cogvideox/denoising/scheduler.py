"""DDIM and DPM steps of CogVideoX as one pure function of arrays.

Both schedulers, for every prediction type, are linear in the sample, the model output, the last
prediction of x0 and the noise. The host computes the coefficients in diffusers' precision (float64
for the published beta schedule) and passes them to the jitted step. So changing the step count,
scheduler or prediction type does not recompile.

Sources: diffusers' schedulers/scheduling_dpm_cogvideox.py (DPM-Solver++ 2M SDE, arXiv 2211.01095,
in CogVideoX's form) and scheduling_ddim_cogvideox.py (arXiv 2010.02502). Tests compare both. They
are not imported here because that takes longer than reading the weights.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cogvideox.model.config import SchedulerConfig
from cogvideox.model.settings import DenoisingSettings

if TYPE_CHECKING:
    from cogvideox.denoising.step_mask import StepMask

_Real = float | np.floating


class StepCoefficients[Scalar](NamedTuple):
    """Coefficients of one denoising step: floats on the host, float32 arrays [] inside jit.

    x0 = x0_sample * sample + x0_output * model_output
    next = sample * sample + x0 * x0 + previous_x0 * previous_x0 + noise * noise
    """

    x0_sample: Scalar
    x0_output: Scalar
    sample: Scalar
    x0: Scalar
    previous_x0: Scalar
    noise: Scalar


def step(
    sample: jax.Array,
    model_output: jax.Array,
    previous_x0: jax.Array,
    noise: jax.Array,
    coefficients: StepCoefficients[jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Computes one denoising step in float32.

    Args:
        sample: the noisy latents [B, T, C, H, W].
        model_output: the guided prediction, same shape.
        previous_x0: the last step's x0, same shape; any finite values if its weight is 0.
        noise: standard normal, same shape; any finite values if its weight is 0.

    Returns:
        The latents of the next timestep and the predicted x0, both float32.
    """
    sample = sample.astype(jnp.float32)
    x0 = coefficients.x0_sample * sample + coefficients.x0_output * model_output.astype(jnp.float32)
    drift = coefficients.sample * sample + coefficients.x0 * x0
    drift = drift + coefficients.previous_x0 * previous_x0
    return drift + coefficients.noise * noise.astype(jnp.float32), x0


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Per-step arguments of one run, on the host.

    Attributes:
        noise_draws: draws by diffusers in each step; the last one is used.
        mask: which steps run the transformer; None runs it in all.
        start_alpha: cumulative alpha at the first timestep of video-to-video, for `add_noise`; None
            starts from pure noise.
        guided_steps: the steps from this one on reuse the difference of guidance of the step
            before; None computes it in all.
        dense_steps: the steps from this one on attend sparsely; None attends densely in all.
    """

    timesteps: tuple[int, ...]
    guidance_scales: tuple[float, ...]
    coefficients: tuple[StepCoefficients[float], ...]
    noise_draws: tuple[int, ...]
    mask: "StepMask | None" = None
    guided_steps: int | None = None
    dense_steps: int | None = None
    start_alpha: float | None = None

    def __post_init__(self) -> None:
        steps = len(self.timesteps)
        if self.mask and len(self.mask.computed) != steps:
            raise ValueError(f"the step mask has {len(self.mask.computed)} steps, the run {steps}")
        if self.guided_steps is not None and not 0 < self.guided_steps < steps:
            raise ValueError(
                f"a run of {steps} steps cannot end guidance after {self.guided_steps} of them; "
                f"take 1 to {steps - 1}"
            )
        if self.dense_steps is not None and not 0 <= self.dense_steps < steps:
            raise ValueError(
                f"a run of {steps} steps cannot turn sparse after {self.dense_steps} of them; "
                f"take 0 to {steps - 1}"
            )


def make_schedule(settings: DenoisingSettings, config: SchedulerConfig) -> Schedule:
    """Computes the timesteps, guidance scales, coefficients and noise draws of a run.

    Args:
        settings: scheduler (dpm or ddim), steps and guidance.
        config: the model's scheduler config, of either class.

    Raises:
        ValueError: there are more steps than training timesteps, or the prediction type is
            unknown.
    """
    steps = settings.num_inference_steps
    if steps > config.num_train_timesteps:
        raise ValueError(f"{steps} steps are more than {config.num_train_timesteps}")
    alphas = _alphas(config)
    final = alphas.dtype.type(1) if config.set_alpha_to_one else alphas[0]
    timesteps = _timesteps(config, steps)
    stride = config.num_train_timesteps // steps
    # Video-to-video runs the last steps, with the strides of all.
    timesteps = timesteps[steps - settings.executed_steps :]
    coefficients, draws = [], []
    for i, timestep in enumerate(timesteps):
        previous = timestep - stride
        alpha, alpha_next = alphas[timestep], alphas[previous] if previous >= 0 else final
        # Zero terminal SNR makes alpha 0; the infinities cancel below.
        with np.errstate(divide="ignore"):
            if settings.scheduler == "ddim":
                update, drawn = _ddim_update(alpha, alpha_next), 0
            else:
                # diffusers falls back to first order, with one draw, if there is no earlier x0
                # (first step) or the step goes past the end (usually the last one).
                second_order = i > 0 and previous >= 0
                alpha_back = alphas[timesteps[i - 1]] if second_order else None
                update = _dpm_update(alpha, alpha_next, alpha_back)
                drawn = 2 if second_order else 1
            weights = (*_x0_weights(config.prediction_type, alpha), *update)
        coefficients.append(StepCoefficients(*map(float, weights)))
        draws.append(drawn)
    scales = [_guidance_scale(settings, timestep) for timestep in timesteps]
    start_alpha = None if settings.strength is None else float(alphas[timesteps[0]])
    return Schedule(
        *(tuple(timesteps), tuple(scales), tuple(coefficients), tuple(draws)),
        start_alpha=start_alpha,
    )


def _alphas(config: SchedulerConfig) -> np.ndarray:
    """Computes the cumulative product of alphas at each training timestep."""
    kind, count = config.beta_schedule, config.num_train_timesteps
    start, stop = config.beta_start, config.beta_end
    if config.trained_betas is not None:
        betas = np.asarray(config.trained_betas, np.float32)
    elif kind == "linear":
        betas = np.linspace(start, stop, count, dtype=np.float32)
    elif kind == "scaled_linear":
        betas = np.linspace(start**0.5, stop**0.5, count) ** 2
    elif kind == "squaredcos_cap_v2":
        bars = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - bars[1:] / bars[:-1], 0.999).astype(np.float32)
    else:
        raise ValueError(f"the scheduler's beta_schedule {kind!r} is not known")
    alphas = np.cumprod(1 - betas, dtype=np.float64).astype(betas.dtype)
    shift = config.snr_shift_scale
    alphas = alphas / (shift + (1 - shift) * alphas)
    if config.rescale_betas_zero_snr:
        roots = np.sqrt(alphas)
        alphas = ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2
    return alphas


def _timesteps(config: SchedulerConfig, steps: int) -> list[int]:
    """Returns the training timesteps to denoise at, noisiest first."""
    spacing, trained = config.timestep_spacing, config.num_train_timesteps
    if spacing == "linspace":
        timesteps = np.linspace(0, trained - 1, steps).round()[::-1]
    elif spacing == "leading":
        timesteps = np.arange(steps)[::-1] * (trained // steps) + config.steps_offset
    elif spacing == "trailing":
        timesteps = np.round(np.arange(trained, 0, -trained / steps)) - 1
    else:
        raise ValueError(f"the scheduler's timestep_spacing {spacing!r} is not known")
    return [int(timestep) for timestep in timesteps]


def _x0_weights(prediction_type: str, alpha: np.floating) -> tuple[_Real, _Real]:
    """Returns the weights of sample and model output in the prediction of x0."""
    if prediction_type == "v_prediction":
        return alpha**0.5, -((1 - alpha) ** 0.5)
    if prediction_type == "epsilon":
        return 1 / alpha**0.5, -((1 - alpha) ** 0.5) / alpha**0.5
    if prediction_type == "sample":
        return 0.0, 1.0
    raise ValueError(f"the scheduler's prediction_type {prediction_type!r} is not known")


def _ddim_update(alpha: np.floating, alpha_next: np.floating) -> tuple[_Real, ...]:
    sample = ((1 - alpha_next) / (1 - alpha)) ** 0.5
    return sample, alpha_next**0.5 - alpha**0.5 * sample, 0.0, 0.0


def _dpm_update(
    alpha: np.floating, alpha_next: np.floating, alpha_back: np.floating | None
) -> tuple[_Real, ...]:
    """Computes a DPM update; first order without `alpha_back`, the previous step's alpha."""

    def log_snr(alpha: np.floating) -> np.floating:
        return np.log((alpha / (1 - alpha)) ** 0.5)

    h = log_snr(alpha_next) - log_snr(alpha)
    sample = ((1 - alpha_next) / (1 - alpha)) ** 0.5 * np.exp(-h)
    x0 = -np.expm1(-2 * h) * alpha_next**0.5
    noise = (1 - alpha_next) ** 0.5 * (1 - np.exp(-2 * h)) ** 0.5
    back = 0.0
    if alpha_back is not None:
        back = 1 / (2 * (log_snr(alpha) - log_snr(alpha_back)) / h)
    return sample, x0 * (1 + back), -x0 * back, noise


def _guidance_scale(settings: DenoisingSettings, timestep: int) -> float:
    """Computes the guidance scale of a step in float64.

    With dynamic guidance, diffusers uses the timestep (0..999) in place of the step index, so the
    cosine's argument exceeds 1e7 rad. float32 gives values that differ by up to 3.45 on a scale of
    1 to 7.
    """
    if not settings.use_dynamic_cfg:
        return settings.guidance_scale
    steps = settings.executed_steps  # unlike the strides
    phase = math.pi * ((steps - timestep) / steps) ** 5.0
    return 1 + settings.guidance_scale * ((1 - math.cos(phase)) / 2)
