"""The denoising loop: runs compiled steps over a schedule.

The schedule says which steps reuse what earlier ones computed. A step that is computed while later
ones reuse its residual runs a program that keeps it; a schedule without a mask runs the exact step.
Steps that attend sparsely, or reuse the difference of guidance, are parts of the run with a
denoiser of their own.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from cogvideox.denoising.conditioning import Conditioning, Start
from cogvideox.denoising.loop_checkpoint import LoopCheckpoint, TensorTypes
from cogvideox.denoising.noise import NoiseSource, drawn_ahead
from cogvideox.denoising.parts import split_steps
from cogvideox.denoising.program import RESIDUAL, TOKENS, Denoiser
from cogvideox.denoising.reuse import Reusable, Reuse
from cogvideox.denoising.scheduler import Schedule
from cogvideox.transformer.parameters import abstract_parameters
from runtime.mesh import place, with_sharding


class LoopState(NamedTuple):
    """State of the loop after `steps` steps, on the devices: [B, S, C] each.

    Attributes:
        denoiser: made the state; it says how the arrays are cut.
        reusable: what the steps so far kept for later ones. Unlike the other arrays it stays valid.
    """

    steps: int
    denoiser: Denoiser
    tokens: jax.Array
    previous_x0: jax.Array
    reusable: Reusable[jax.Array]


@dataclasses.dataclass(frozen=True)
class LoadedDenoiser:
    """A denoiser with what its steps need on the devices.

    Attributes:
        steps: result of `Denoiser.compile`.
        prompt_embeds: result of `Denoiser.prompt_embeds`.
    """

    denoiser: Denoiser
    steps: Mapping[Reuse, Callable]
    parameters: Mapping[str, jax.Array]
    prompt_embeds: jax.Array

    def step(
        self,
        residual: Reuse,
        tokens: jax.Array,
        previous_x0: jax.Array,
        positions: Mapping[str, jax.Array | tuple[jax.Array, jax.Array]],
        noise: jax.Array,
        image: tuple[jax.Array, ...],
        reused: Reusable[jax.Array],
        scalars: tuple,
    ) -> tuple[jax.Array, jax.Array, Reusable[jax.Array]]:
        """Runs a compiled step, which donates `tokens` and `previous_x0`.

        Args:
            residual: what the step does with the residual.
            image: the latents of the image, [B, S, C], of an image-to-video model; else empty.
            scalars: result of `Denoiser.step_scalars`.

        Returns:
            The next tokens and x0, and what the step keeps for later ones.
        """
        take = self.denoiser.arguments_of
        return self.steps[residual](
            *(tokens, previous_x0, take(residual, self.parameters), take(residual, positions)),
            *(self.prompt_embeds, noise, image, reused, *scalars),
        )


def residual_uses(schedule: Schedule) -> list[Reuse]:
    """Returns what each step does with the residual; "off" for all if the mask skips none."""
    mask = schedule.mask
    if mask is None or all(mask.computed):
        return ["off"] * len(schedule.timesteps)
    return ["keep" if computed else "reuse" for computed in mask.computed]


def programs_of_steps(schedule: Schedule) -> list[Reuse]:
    """Returns what the steps of each part may do with the residual; each is a program."""
    return programs_of_masks("off" not in residual_uses(schedule))


def programs_of_masks(masked: bool) -> list[Reuse]:
    """Returns what steps may do with the residual, with or without a mask; all masks have both."""
    return ["keep", "reuse"] if masked else ["off"]


def is_gated(schedule: Schedule, step: int) -> bool:
    """Whether a step reuses the difference of guidance."""
    return schedule.guided_steps is not None and step >= schedule.guided_steps


def checkpoint_tensors(denoiser: Denoiser, schedule: Schedule, steps: int) -> TensorTypes:
    """Returns what a checkpoint after `steps` steps holds.

    Args:
        denoiser: of the run's first step.
    """
    latents, layout = denoiser.latents.sizes, denoiser.layout
    tensors = {"latents": (latents, denoiser.dtype), "previous_x0": (latents, "float32")}
    if residual_uses(schedule)[steps] == "reuse":
        samples = denoiser.latents.batch if is_gated(schedule, steps - 1) else denoiser.samples
        rows = layout.tokens - layout.text
        tensors["residual"] = ((samples, rows, denoiser.config.width), denoiser.dtype)
    if is_gated(schedule, steps):
        tensors["difference"] = (latents, "float32")
    return tensors


def parameters_for(denoiser: Denoiser, parameters: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Gives the weights of a denoiser to `Denoiser.gated` of it, without copying them."""
    abstract = abstract_parameters(denoiser.config, denoiser.mesh, jnp.dtype(denoiser.dtype))
    return {name: with_sharding(parameters[name], abstract[name].sharding) for name in abstract}


def run_loop(
    loaded: Sequence[LoadedDenoiser],
    schedule: Schedule,
    seed: int,
    noise_source: NoiseSource,
    start: LoopCheckpoint | None = None,
    *,
    uses: Sequence[Reuse] | None = None,
    conditioning: Conditioning | None = None,
) -> Iterator[LoopState]:
    """Runs the denoising loop.

    The noise of a step does not depend on what the steps reuse.

    Args:
        loaded: the denoiser of each part, see `parts`.
        start: a state of the same run to resume from; None starts from the initial noise.
        uses: what each step does with the residual; None takes what the schedule's mask needs.
            "keep" for all steps yields the residual of every step of an exact run.
        conditioning: the image or video that the run starts from, if any.

    Yields:
        The state after each step, once the device has computed it. The next step donates its
        arrays, except for `reusable`.
    """
    total = len(schedule.timesteps)
    uses = residual_uses(schedule) if uses is None else uses
    shape, dtype = loaded[0].denoiser.latents, jnp.dtype(loaded[0].denoiser.dtype)
    latents = shape.sizes
    before = conditioning.draws(shape.batch) if conditioning else ()
    noises = noise_source.draw(seed, latents, dtype, schedule.noise_draws, before)
    first, image = (
        conditioning.start(noises, shape, schedule) if conditioning else Start(next(noises))
    )
    initial = LoopCheckpoint(0, first, np.zeros(latents, np.float32))
    done = start or initial
    # Repeat the draws of earlier steps to restore the generator's state.
    remaining = enumerate(itertools.islice(noises, done.steps, None), done.steps)
    parts = split_steps(total, schedule.dense_steps, schedule.guided_steps)
    layouts = [
        one.denoiser.layout
        for part, one in zip(parts, loaded, strict=True)
        for _ in range(part.start, part.stop)
    ]
    rows = (layouts[i].from_latents(noise) for i, noise in remaining)
    with contextlib.closing(drawn_ahead(rows)) as rows_of_noise:
        for part, one in zip(parts, loaded, strict=True):
            state = None
            for state in _run_part(one, schedule, uses, rows_of_noise, image, done, part.stop):
                yield state
            if state and part.stop < total:
                # The next part has other rows or another mesh.
                done = to_host(state, schedule)


def _run_part(
    loaded: LoadedDenoiser,
    schedule: Schedule,
    uses: Sequence[Reuse],
    rows_of_noise: Iterator[np.ndarray],
    image: np.ndarray | None,
    start: LoopCheckpoint,
    stop: int,
) -> Iterator[LoopState]:
    """Runs the steps from `start` to before `stop` on one mesh.

    Args:
        rows_of_noise: of each step, [B, S, C].
        image: the image's latents [B, T, C, H, W], if any.
    """
    if start.steps >= stop:
        return
    denoiser = loaded.denoiser
    tokens, previous_x0, reusable = to_devices(denoiser, start)
    rows = denoiser.sharding(TOKENS)
    position_arrays = place_positions(denoiser)
    images = () if image is None else (place(denoiser.layout.from_latents(image), rows),)
    noise = place(next(rows_of_noise), rows)
    for i in range(start.steps, stop):
        use = uses[i]
        scales = schedule.mask.scales[i] if schedule.mask and use == "reuse" else ()
        scalars = denoiser.step_scalars(
            *(schedule.timesteps[i], schedule.guidance_scales[i], schedule.coefficients[i]),
            scales[-denoiser.branches :],
        )
        reused = Reusable(
            reusable.residual if use == "reuse" else None,
            reusable.difference if denoiser.difference == "reuse" else None,
        )
        tokens, previous_x0, kept = loaded.step(
            *(use, tokens, previous_x0, position_arrays, noise, images, reused, scalars)
        )
        reusable = Reusable(
            *(old if new is None else new for new, old in zip(kept, reusable, strict=True))
        )
        if i + 1 < stop:
            noise = place(next(rows_of_noise), rows)  # while the device computes
        jax.block_until_ready((tokens, previous_x0, reusable))
        yield LoopState(i + 1, denoiser, tokens, previous_x0, reusable)


def place_positions(denoiser: Denoiser) -> dict[str, Any]:
    """Places `Denoiser.positions` on its devices."""
    shardings = jax.tree.map(denoiser.sharding, denoiser.position_specs)
    return jax.tree.map(place, denoiser.positions, shardings)


def to_devices(
    denoiser: Denoiser, state: LoopCheckpoint
) -> tuple[jax.Array, jax.Array, Reusable[jax.Array]]:
    """Places tokens, previous x0 and reusable arrays on the denoiser's devices."""

    def rows(latents: np.ndarray) -> jax.Array:
        return place(denoiser.layout.from_latents(latents), denoiser.sharding(TOKENS))

    residual = state.residual
    if residual is not None:
        # A gated step reuses only the residual of the prompts, which come last.
        residual = denoiser.layout.place(residual[-denoiser.samples :], axis=1)
        residual = place(residual, denoiser.sharding(RESIDUAL))
    difference = None if state.difference is None else rows(state.difference)
    return rows(state.latents), rows(state.previous_x0), Reusable(residual, difference)


def x0_to_host(state: LoopState) -> np.ndarray:
    """Copies what the last step predicted to the host: [B, T, C, H, W] float32.

    Every process must call it.
    """
    x0 = multihost_utils.process_allgather(state.previous_x0, tiled=True)
    return state.denoiser.layout.to_latents(x0)


def to_host(state: LoopState, schedule: Schedule | None = None) -> LoopCheckpoint:
    """Copies a state to the host, independent of the mesh.

    Every process must call it, and every process gets the full state.

    Args:
        schedule: also copies what its next step reuses.
    """
    residual = difference = None
    if schedule is not None and residual_uses(schedule)[state.steps] == "reuse":
        residual = state.reusable.residual
    if schedule is not None and is_gated(schedule, state.steps):
        difference = state.reusable.difference
    arrays = (state.tokens, state.previous_x0, Reusable(residual, difference))
    tokens, previous_x0, kept = multihost_utils.process_allgather(arrays, tiled=True)
    layout = state.denoiser.layout
    return LoopCheckpoint(
        *(state.steps, layout.to_latents(tokens), layout.to_latents(previous_x0)),
        None if residual is None else kept.residual[:, layout.video],
        None if difference is None else layout.to_latents(kept.difference),
    )
