"""The compiled steps of a denoising run, and the devices' arrays that they need."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stages.speed import NamedSpeed, resolve

if TYPE_CHECKING:
    import jax
    import numpy as np

    from cogvideox.denoising.loop import LoadedDenoiser
    from cogvideox.denoising.program import Denoiser, Reuse
    from cogvideox.denoising.scheduler import Schedule
    from cogvideox.model.settings import DenoisingSettings
    from runtime.programs import Program


class CompiledSteps(NamedTuple):
    """Results of `Denoiser.compile`.

    Attributes:
        gated: of the gated steps; empty if there are none.
    """

    guided: Mapping[Reuse, Callable]
    gated: Mapping[Reuse, Callable]


def programs_for(
    denoiser: Denoiser, settings: DenoisingSettings, speeds: Iterable[str]
) -> list[Program]:
    """Returns the programs that load the weights and those of the steps, each once.

    Args:
        denoiser: the exact one.
        speeds: values of `--speed`.
    """
    from cogvideox.denoising.loop import programs_of_masks

    found: dict[str, Program] = {}
    for speed in speeds:
        lossy = resolve(NamedSpeed(speed), settings, None)
        residuals, parts = programs_of_masks(lossy.mask is not None), [denoiser]
        if lossy.guided_steps:
            keeping = dataclasses.replace(denoiser, difference="keep")
            parts = [keeping, keeping.gated()]
        programs = [part.step_program(residual) for part in parts for residual in residuals]
        found |= {program.manifest_name: program for program in programs}
    return [*found.values(), *denoiser.stack_programs]


def compile_steps(
    denoiser: Denoiser, gated: Denoiser | None, schedule: Schedule, executables: Path | None
) -> CompiledSteps:
    """Reads or compiles the programs that a schedule runs.

    Args:
        gated: result of `Denoiser.gated` if the schedule has gated steps.
    """
    from cogvideox.denoising.loop import programs_of_steps

    of_guided, of_gated = programs_of_steps(schedule)
    return CompiledSteps(
        denoiser.compile(executables, of_guided),
        gated.compile(executables, of_gated) if gated else {},
    )


def foresee_steps(
    denoiser: Denoiser, gated: Denoiser | None, schedule: Schedule, executables: Path | None
) -> str:
    """Says what `compile_steps` is about to do, such as "loading the transformer's program"."""
    from cogvideox.denoising.loop import programs_of_steps
    from runtime.executables import foresee

    of_guided, of_gated = programs_of_steps(schedule)
    programs = [denoiser.step_program(residual) for residual in of_guided]
    programs += [gated.step_program(residual) for residual in of_gated] if gated else []
    todo = foresee(programs, executables, list(denoiser.mesh.devices.flat))
    return f"{todo} the transformer's program"


def load_steps(
    denoiser: Denoiser,
    gated: Denoiser | None,
    steps: CompiledSteps,
    parameters: Mapping[str, jax.Array],
    embeddings: Mapping[str, np.ndarray],
) -> list[LoadedDenoiser]:
    """Places the embeddings; returns the denoiser, and the gated one after it if there is one.

    The gated steps use the same weights, which are not copied.
    """
    from cogvideox.denoising.loop import LoadedDenoiser, parameters_for

    loaded = [
        LoadedDenoiser(denoiser, steps.guided, parameters, denoiser.prompt_embeds(embeddings))
    ]
    if gated:
        weights = parameters_for(gated, parameters)
        prompts = gated.prompt_embeds(embeddings)
        loaded.append(LoadedDenoiser(gated, steps.gated, weights, prompts))
    return loaded
