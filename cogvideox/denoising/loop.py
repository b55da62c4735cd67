"""The denoising loop: the compiled step, run over a schedule."""

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
    """The loop's state after `steps` steps, on the devices: [B, S, C] each."""

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
        compiled_step: of `Denoiser.compile`.
        start: a state of the same run to resume from; the first noise if None.

    Yields:
        The state after each step, once the device has computed it. Its arrays are donated to the
        next step, so only the last may be kept.
    """
    rows, dtype = denoiser.sharding(TOKENS), jnp.dtype(denoiser.dtype)
    noises = noise_source.draw(seed, denoiser.latents.sizes, dtype, schedule.noise_draws)
    latents, done = next(noises), 0
    previous_x0 = np.zeros(latents.shape, np.float32)
    if start:
        latents, previous_x0, done = start.latents, start.previous_x0, start.steps
    # Draws again what earlier steps drew: the generator's state is then the same.
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
            # Drawn on the host while the device computes: 0.1 s of a step of seconds.
            noise = place(denoiser.layout.from_latents(next(noises)), rows)
        yield jax.block_until_ready(LoopState(i + 1, tokens, previous_x0))


def to_host(denoiser: Denoiser, state: LoopState) -> LoopCheckpoint:
    """Copies a state to the host as latents, without what depends on the mesh.

    Of several processes all must call it, and all get the whole state.
    """
    tokens = multihost_utils.process_allgather((state.tokens, state.previous_x0), tiled=True)
    latents, previous_x0 = map(denoiser.layout.to_latents, tokens)
    return LoopCheckpoint(state.steps, latents, previous_x0)
