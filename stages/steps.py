"""The compiled steps of a denoising run, and the devices' arrays that they need."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stages.speed import Lossy, NamedSpeed, resolve

if TYPE_CHECKING:
    import jax
    import numpy as np

    from cogvideox.denoising.loop import LoadedDenoiser
    from cogvideox.denoising.program import Denoiser
    from cogvideox.denoising.reuse import Reuse
    from cogvideox.denoising.scheduler import Schedule
    from cogvideox.model.settings import DenoisingSettings
    from cogvideox.transformer.precision import Precision
    from runtime.programs import Program

# Shares from which on a run says that sparse attention does not pay.
_MUCH_PADDING, _ALMOST_ALL = 0.1, 0.9

# Results of `Denoiser.compile`, for each part of a run.
CompiledSteps = Sequence[Mapping["Reuse", Callable]]


def denoisers_of(exact: Denoiser, lossy: Lossy, steps: int) -> list[Denoiser]:
    """Returns the denoiser of each part of a run (see `cogvideox.denoising.parts`).

    Args:
        exact: without lossy options.

    Raises:
        ValueError: attention cannot be sparse on these devices, or not by these rules, or they
            lack products of this precision.
    """
    from cogvideox.denoising.parts import split_steps

    if lossy.precision.options:
        check_precision(exact, lossy.precision)
        backend = dataclasses.replace(exact.backend, precision=lossy.precision)
        exact = dataclasses.replace(exact, backend=backend)
    if lossy.sparse:
        check_takes_lists(exact)
    guided = dataclasses.replace(exact, difference="keep") if lossy.guided_steps else exact
    found = []
    for part in split_steps(steps, lossy.dense_steps, lossy.guided_steps):
        one = dataclasses.replace(guided, sparse=lossy.sparse) if part.sparse else guided
        found.append(one.gated() if part.gated else one)
        if part.sparse:
            _ = found[-1].sparse_step  # raises ValueError
    return found


def check_precision(denoiser: Denoiser, precision: Precision) -> None:
    """Checks that the devices have the products.

    Raises:
        ValueError: they do not.
    """
    backend = denoiser.backend
    if precision.attention not in backend.attention_precisions:
        raise ValueError(
            f"--attention_precision {precision.attention} needs a TPU, or --attention reference, "
            f"which is slow; --attention {backend.name} on this device has "
            f"{', '.join(backend.attention_precisions)}"
        )


def check_takes_lists(denoiser: Denoiser) -> None:
    """Checks that attention can be sparse.

    Raises:
        ValueError: it cannot.
    """
    if not denoiser.backend.takes_lists:
        raise ValueError(
            f"--attention {denoiser.backend.name} on this device has no sparse attention: take "
            "--sparse_attention none, or --attention reference, which is slow"
        )


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
        residuals = programs_of_masks(lossy.mask is not None)
        parts = denoisers_of(denoiser, lossy, settings.executed_steps)
        programs = [part.step_program(residual) for part in parts for residual in residuals]
        found |= {program.manifest_name: program for program in programs}
    return [*found.values(), *denoiser.stack_programs]


def compile_steps(
    denoisers: Sequence[Denoiser], schedule: Schedule, executables: Path | None
) -> CompiledSteps:
    """Reads or compiles the programs that a schedule runs.

    Args:
        denoisers: of each part.
    """
    from cogvideox.denoising.loop import programs_of_steps

    residuals = programs_of_steps(schedule)
    return [denoiser.compile(executables, residuals) for denoiser in denoisers]


def foresee_steps(
    denoisers: Sequence[Denoiser], schedule: Schedule, executables: Path | None
) -> str:
    """Says what `compile_steps` is about to do, such as "loading the transformer's program"."""
    from cogvideox.denoising.loop import programs_of_steps
    from runtime.executables import foresee

    residuals = programs_of_steps(schedule)
    programs = [one.step_program(residual) for one in denoisers for residual in residuals]
    todo = foresee(programs, executables, list(denoisers[0].mesh.devices.flat))
    return f"{todo} the transformer's program"


def load_steps(
    denoisers: Sequence[Denoiser],
    steps: CompiledSteps,
    parameters: Mapping[str, jax.Array],
    embeddings: Mapping[str, np.ndarray],
) -> list[LoadedDenoiser]:
    """Places the embeddings for each part. All parts use the same weights, which are not copied."""
    from cogvideox.denoising.loop import LoadedDenoiser, parameters_for

    return [
        LoadedDenoiser(
            denoiser,
            compiled,
            parameters_for(denoiser, parameters) if denoiser.difference == "reuse" else parameters,
            denoiser.prompt_embeds(embeddings),
        )
        for denoiser, compiled in zip(denoisers, steps, strict=True)
    ]


def describe_sparse(denoisers: Sequence[Denoiser]) -> list[str]:
    """Says for people what the sparse steps of a run compute, if it has any."""
    steps = [denoiser for denoiser in denoisers if denoiser.sparse_step]
    if not steps:
        return []
    layout, sparse = steps[0].layout, steps[0].sparse_step
    assert sparse is not None
    density = sparse.density()
    line = f"sparse attention: {density:.0%} of the blocks of attention are computed"
    padding = 1 - layout.tokens / layout.padded
    if padding > _MUCH_PADDING:
        line += f"; {padding:.0%} of the rows are padding, because this size fits badly"
    if density > _ALMOST_ALL:
        line += "; at this size the rules leave out almost nothing"
    return [line]
