"""Measures, on one video, what a run loses by skipping the steps of one segment.

An exact run keeps the residuals of the last few steps. Beside it, each segment (i, j) that may be
skipped runs from the exact state after step i with the residual of i; its state at j is compared
with the exact one. That costs almost nothing, because such steps run no block. Then, for each step
j, an exact run goes to the end from one of these states and shows how much of the error at j is
left there.

All errors are mean squares, relative to the variance of the exact run's final latents. Padding
frames do not count.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from cogvideox.denoising.calibration import LONGEST_SKIP, first_steps, weigh_edges
from cogvideox.denoising.loop import LoadedDenoiser, place_positions
from cogvideox.denoising.noise import NoiseSource
from cogvideox.denoising.program import TOKENS
from cogvideox.denoising.reuse import Reusable, Reuse
from cogvideox.denoising.scheduler import Schedule
from runtime.errors import RunError
from runtime.mesh import place

# Tokens and x0 [B, S, C] on the devices. A step donates both.
_State = tuple[jax.Array, jax.Array]
# By step, latents and x0 at the end of the probe's segment, on the host.
_Probes = dict[int, tuple[np.ndarray, np.ndarray]]

_PROBE_LENGTH = 3  # a probe skips up to two steps


@dataclasses.dataclass(frozen=True)
class VideoErrors:
    """What was measured on one video.

    Attributes:
        ratios: MagCache's, [steps][branches].
        errors: by edge, at the edge's end.
        final_errors: by step j, the error at the end of the run that skips only the segment
            `probe_edge(j)`.
    """

    ratios: list[list[float]]
    errors: dict[tuple[int, int], float]
    final_errors: dict[int, float]


def probe_edge(j: int, steps: int) -> tuple[int, int]:
    """The segment before step j that is skipped to measure the gain of j."""
    return max(j - _PROBE_LENGTH, first_steps(steps) - 1), j


def probed_steps(steps: int) -> list[int]:
    """The steps whose gain is measured."""
    return list(range(first_steps(steps) + 1, steps))


def exact_steps(steps: int) -> int:
    """The number of computed steps that the measurement on one video takes."""
    return steps + sum(steps - j for j in probed_steps(steps))


def mean_over_videos(
    videos: list[VideoErrors], steps: int
) -> tuple[list[list[float]], dict[tuple[int, int], float]]:
    """Returns the mean ratios, and the edge weights: squares of the mean root of all videos.

    The mean of the squares would be that of the few videos whose content changes.
    """
    ratios = np.mean([video.ratios for video in videos], axis=0).tolist()
    roots = []
    for video in videos:
        gains = {}
        for j, final in video.final_errors.items():
            before = video.errors[probe_edge(j, steps)]
            gains[j] = final / before if before else 1.0
        weights = weigh_edges(video.errors, gains, steps)
        roots.append({edge: weight**0.5 for edge, weight in weights.items()})
    edges = roots[0]
    return ratios, {edge: float(np.mean([root[edge] for root in roots])) ** 2 for edge in edges}


class Measurement:
    """The measurement on one video; `run` performs it."""

    def __init__(
        self,
        loaded: LoadedDenoiser,
        schedule: Schedule,
        seed: int,
        noise_source: NoiseSource,
        padding_frames: int,
        on_step: Callable[[], None],
    ) -> None:
        """
        Args:
            loaded: with the programs "keep" and "reuse".
            schedule: without a mask.
            padding_frames: leading latent frames that do not count.
            on_step: called after each computed step.
        """
        self._loaded, self._schedule = loaded, schedule
        self._padding, self._on_step = padding_frames, on_step
        denoiser = loaded.denoiser
        # Runs to the end use the noise of late steps again and again; drawing takes 0.1 s each.
        self._noises = list(
            noise_source.draw(
                *(seed, denoiser.latents.sizes, np.dtype(denoiser.dtype), schedule.noise_draws)
            )
        )
        self._placed_noise: tuple[int, jax.Array] | None = None
        self._positions = place_positions(denoiser)

    def run(self, known: VideoErrors | None = None) -> Iterator[VideoErrors]:
        """Measures.

        Args:
            known: an earlier result to continue from.

        Yields:
            The result so far, after the exact run and after each run to the end.

        Raises:
            RunError: the model makes numbers that are not finite.
        """
        steps = len(self._schedule.timesteps)
        wanted = [j for j in probed_steps(steps) if not known or j not in known.final_errors]
        if known and not wanted:
            yield known
            return
        exact, probes, final = self._exact_run()
        variance = float(final.var())
        exact.errors.update({edge: error / variance for edge, error in exact.errors.items()})
        measured = exact if known is None else known
        values = [*measured.errors.values(), *(r for ratios in measured.ratios for r in ratios)]
        if not variance or not np.isfinite(values).all():
            raise RunError("the model makes latents that are not finite, or constant")
        yield measured
        for j in wanted:
            tokens, x0 = map(self._place, probes[j])
            for k in range(j, steps):
                tokens, x0, _ = self._step(k, (tokens, x0), "keep")
                jax.block_until_ready(tokens)
                self._on_step()
            error = _mean_square(self._latents(tokens) - final) / variance
            measured = dataclasses.replace(
                measured, final_errors={**measured.final_errors, j: error}
            )
            yield measured

    def _exact_run(
        self,
    ) -> tuple[VideoErrors, _Probes, np.ndarray]:
        """Runs exactly, and every segment beside it.

        Returns:
            Ratios and absolute errors; the probes; the final latents.
        """
        steps, denoiser = len(self._schedule.timesteps), self._loaded.denoiser
        first, probed = first_steps(steps), probed_steps(steps)
        latents = self._noises[0]
        state = (self._place(latents), self._place(np.zeros(latents.shape, np.float32)))
        ratios = [[1.0] * denoiser.branches]
        errors, probes = {}, {}
        residuals: dict[int, jax.Array] = {}
        segments: dict[int, _State] = {}  # by their first step, the state after skipped steps
        previous = None
        for k in range(steps):
            if k >= first:
                segments[k - 1] = (jnp.copy(state[0]), jnp.copy(state[1]))
            tokens, x0, residual = self._step(k, state, "keep")
            state = tokens, x0
            assert residual is not None
            if previous is not None:
                ratios.append(self._ratios(residual, previous))
            exact = self._latents(state[0])
            for i in list(segments):
                scales = np.prod(ratios[i + 1 : k + 1], axis=0)
                tokens, x0, _ = self._step(k, segments[i], "reuse", residuals[i], scales)
                segments[i] = tokens, x0
                j = k + 1
                errors[i, j] = _mean_square(self._latents(tokens) - exact)
                if j in probed and probe_edge(j, steps) == (i, j):
                    probes[j] = self._host(tokens), self._host(x0)
                if j - i > LONGEST_SKIP:
                    del segments[i]
            previous = residual
            residuals[k] = residual
            residuals.pop(k - LONGEST_SKIP, None)
            self._on_step()
        return VideoErrors(ratios, errors, {}), probes, self._latents(state[0])

    def _step(
        self,
        k: int,
        state: _State,
        use: Reuse,
        residual: jax.Array | None = None,
        scales: np.ndarray | tuple[float, ...] = (),
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Runs step k; returns its tokens, x0 and residual, if it keeps one."""
        loaded, schedule = self._loaded, self._schedule
        scalars = loaded.denoiser.step_scalars(
            *(schedule.timesteps[k], schedule.guidance_scales[k], schedule.coefficients[k]),
            [float(scale) for scale in scales],
        )
        reused = Reusable(residual, None)
        tokens, previous_x0, kept = loaded.step(
            *(use, *state, self._positions, self._noise(k), (), reused, scalars)
        )
        return tokens, previous_x0, kept.residual

    def _noise(self, k: int) -> jax.Array:
        """The noise of step k on the devices; segments of one step share it."""
        if self._placed_noise is None or self._placed_noise[0] != k:
            self._placed_noise = k, self._place(self._noises[k + 1])
        return self._placed_noise[1]

    def _place(self, latents: np.ndarray) -> jax.Array:
        denoiser = self._loaded.denoiser
        return place(denoiser.layout.from_latents(latents), denoiser.sharding(TOKENS))

    def _host(self, tokens: jax.Array) -> np.ndarray:
        return self._loaded.denoiser.layout.to_latents(np.asarray(tokens))

    def _latents(self, tokens: jax.Array) -> np.ndarray:
        """The latents that count, [B, T, C, H, W] float64."""
        return self._host(tokens)[:, self._padding :].astype(np.float64)

    def _ratios(self, residual: jax.Array, previous: jax.Array) -> list[float]:
        """MagCache's ratio of each branch: the mean over its video tokens."""
        layout = self._loaded.denoiser.layout
        by_sample = _token_ratios(residual, previous, layout.text, layout.tokens)
        branches = np.split(np.asarray(by_sample), self._loaded.denoiser.branches)
        return [float(branch.mean()) for branch in branches]


@jax.jit(static_argnums=(2, 3))
def _token_ratios(residual: jax.Array, previous: jax.Array, first: int, stop: int) -> jax.Array:
    """Mean ratio of the norms of [samples, S, E] over the rows from `first` to before `stop`."""
    norms = [jnp.linalg.norm(x.astype(jnp.float32), axis=-1) for x in (residual, previous)]
    rows = jnp.arange(residual.shape[1])
    is_video = (rows >= first) & (rows < stop)
    ratios = jnp.where(is_video, norms[0] / jnp.where(is_video, norms[1], 1), 0)
    return ratios.sum(axis=1) / (stop - first)


def _mean_square(difference: np.ndarray) -> float:
    return float(np.square(difference).mean())
