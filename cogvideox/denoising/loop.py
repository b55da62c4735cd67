"""The denoising loop: runs the compiled step over a schedule."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from cogvideox.denoising.loop_checkpoint import LoopCheckpoint
from cogvideox.denoising.noise import NoiseSource
from cogvideox.denoising.program import TOKENS, Denoiser
from cogvideox.denoising.scheduler import Schedule
from runtime.mesh import place


class LoopState(NamedTuple):
    """State of the loop after `steps` steps, on the devices: [B, S, C] each."""

    steps: int
    tokens: jax.Array
    previous_x0: jax.Array


def run_loop(
    denoiser: Denoiser,
    compiled_step: Callable,
    parameters: Mapping[str, jax.Array],
    prompt_embeds: jax.Array,
    schedule: Schedule,
    seed: int,
    noise_source: NoiseSource,
    start: LoopCheckpoint | None = None,
) -> Iterator[LoopState]:
    """Runs the denoising loop.

    Args:
        compiled_step: result of `Denoiser.compile`.
        start: a state of the same run to resume from; None starts from the initial noise.

    Yields:
        The state after each step, once the device has computed it. The next step donates its
        arrays, so only the last state stays valid.
    """
    rows, dtype = denoiser.sharding(TOKENS), jnp.dtype(denoiser.dtype)
    noises = noise_source.draw(seed, denoiser.latents.sizes, dtype, schedule.noise_draws)
    latents, done = next(noises), 0
    previous_x0 = np.zeros(latents.shape, np.float32)
    if start:
        latents, previous_x0, done = start.latents, start.previous_x0, start.steps
    # Repeat the draws of earlier steps to restore the generator's state.
    noise = next(itertools.islice(noises, done, None))
    tokens, previous_x0, noise = (
        place(denoiser.layout.from_latents(array), rows) for array in (latents, previous_x0, noise)
    )
    position_arrays = jax.tree.map(
        place, denoiser.positions, jax.tree.map(denoiser.sharding, denoiser.position_specs)
    )
    for i, timestep in itertools.islice(enumerate(schedule.timesteps), done, None):
        guidance_scale, coefficients = schedule.guidance_scales[i], schedule.coefficients[i]
        scalars = denoiser.step_scalars(timestep, guidance_scale, coefficients)
        tokens, previous_x0 = compiled_step(
            tokens, previous_x0, parameters, position_arrays, prompt_embeds, noise, *scalars
        )
        if i + 1 < len(schedule.timesteps):
            # The host draws while the device computes: 0.1 s of a step that takes seconds.
            noise = place(denoiser.layout.from_latents(next(noises)), rows)
        yield jax.block_until_ready(LoopState(i + 1, tokens, previous_x0))


def to_host(denoiser: Denoiser, state: LoopState) -> LoopCheckpoint:
    """Copies a state to the host as latents, independent of the mesh.

    Every process must call it, and every process gets the full state.
    """
    tokens = multihost_utils.process_allgather((state.tokens, state.previous_x0), tiled=True)
    latents, previous_x0 = map(denoiser.layout.to_latents, tokens)
    return LoopCheckpoint(state.steps, latents, previous_x0)
