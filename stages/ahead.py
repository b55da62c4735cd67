"""Compiles the programs of stages 2 and 3 before they are needed, also for an absent machine."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from runtime.chips import MACHINES
from runtime.devices import start_jax
from runtime.errors import RunError
from runtime.progress import progress
from stages import decode, denoise, files

if TYPE_CHECKING:
    from cogvideox.model.folder import ModelFolder
    from cogvideox.model.settings import DenoisingSettings
    from runtime.jax_types import Device
    from stages.plan import Target

LOCAL = "local"
TOPOLOGIES = (LOCAL, *MACHINES)


@dataclasses.dataclass(frozen=True)
class AheadOptions:
    """Options of compile_ahead.py, by the names of the command line.

    Attributes:
        stages: 2, 3 or both.
        sizes: (height, width, frames) each; None takes the model's.
        topology: one of TOPOLOGIES.
        batch: number of prompts.
        frames: what stage 3 returns.
        pull: where to copy artifacts from first.
        push: where to copy all artifacts to at the end.
        compile_all: with a plan, derive nothing.
    """

    model_id: str
    stages: Sequence[int]
    decoder: str
    sizes: Sequence[tuple[int, int, int]] | None
    topology: str
    dp: int | None
    sp: int | None
    tp: int | None
    dtype: str
    attention: str
    batch: int
    unguided: bool
    max_sequence_length: int | None
    frames: Literal["uint8", "float32"]
    allow_unsupported: bool
    executables: Path | None
    pull: str | None
    push: str | None
    compile_all: bool


def compile_sizes(options: AheadOptions, folder: Path, targets: Sequence[Target]) -> None:
    """Pulls artifacts, compiles every target into `folder`, and pushes; prints what was made.

    Raises:
        RunError: artifacts cannot be pulled or pushed.
    """
    if options.pull:
        _move("pull", options.pull, folder)
    for target in targets:
        compile_target(target, folder, options.frames)
    if options.push:
        _move("push", options.push, folder)


def plan_sizes(options: AheadOptions, targets: Sequence[Target]) -> list[dict[str, Any]]:
    """Plans every size: memory and time, as JSON values."""
    from stages import plan

    # A GPU's compiler times candidates on the device, where two compilations disturb each other.
    on_gpu = targets[0].device.platform == "gpu"
    threads = 1 if on_gpu else len(os.sched_getaffinity(0))
    plans = plan.make_plans(targets, compile_all=options.compile_all, threads=threads)
    return list(progress(plans, total=len(targets), what="planning", unit="size"))


def make_targets(options: AheadOptions) -> list[Target]:
    """Makes the programs of every size; compiles nothing.

    Raises:
        ValueError: a size, mesh or attention cannot be computed.
    """
    from cogvideox.model.folder import find_model
    from cogvideox.model.settings import complete_settings, text_tokens

    model = find_model(options.model_id, [])
    tokens = text_tokens(options.max_sequence_length, model.transformer)
    settings = []
    for height, width, num_frames in options.sizes or [(None, None, None)]:
        wishes: dict[str, Any] = {"height": height, "width": width, "num_frames": num_frames}
        wishes |= {"use_dynamic_cfg": False, "seed": 0}
        wishes |= {"guidance_scale": 1.0} if options.unguided else {}
        settings.append(complete_settings(wishes, model, any_size=options.allow_unsupported))
    devices = _devices(options)
    return [_make_target(options, model, tokens, one, devices) for one in settings]


def _devices(options: AheadOptions) -> Sequence[Device]:
    if options.topology == LOCAL:
        start_jax(options.dtype)
        import jax

        return jax.devices()
    from runtime.topology import machine_devices

    devices = list(machine_devices(options.topology).flat)
    start_jax(options.dtype)
    return devices


def _make_target(
    options: AheadOptions,
    model: ModelFolder,
    tokens: int,
    settings: DenoisingSettings,
    devices: Sequence[Device],
) -> Target:
    from cogvideox.model.settings import latent_shape
    from stages.plan import Target

    latents, padding = latent_shape(settings, model, options.batch)
    denoiser = denoise.make_denoiser(
        model,
        {},
        latents,
        tokens,
        guided=settings.guided,
        dtype=options.dtype,
        attention=options.attention,
        mesh=(options.dp, options.sp, options.tp),
        devices=devices,
    )
    decoding = decode.DecodeOptions(
        input_dir=Path(), dtype=options.dtype, decoder=options.decoder, dp=options.dp, tp=options.tp
    )
    decoder = decode.make_decoder(decoding, model, decode.make_mesh(decoding, devices))
    return Target(
        settings,
        denoise.saved_shape(latents, padding),
        denoiser=denoiser if 2 in options.stages else None,
        decoder=decoder if 3 in options.stages else None,
    )


def compile_target(target: Target, folder: Path, frames: Literal["uint8", "float32"]) -> None:
    """Compiles the programs of one size into `folder`, and prints what was made."""
    from runtime.artifacts import parse_manifest
    from runtime.executables import compile_into

    parts = []
    if target.denoiser:
        parts.append((target.denoiser.programs, 1))
    if target.decoder:
        programs = target.decoder.programs(target.latents, output=frames)
        parts.append((programs, target.decoder.compiler_threads))
    for programs, threads in parts:
        made = compile_into(programs, folder, threads=threads)
        for program in programs:
            path = folder / program.manifest_name
            manifest = parse_manifest(path.name, path.read_bytes())
            hbm, size = manifest["hbm_bytes_per_device"]["total"], manifest["executable"]["bytes"]
            seconds = f"compiled in {manifest['compile_seconds']} s"
            print(
                f"{path.name}: {seconds if path.name in made else 'already there'}, "
                f"{size / 1e6:.2f} MB, {hbm / 1e9:.2f} GB a device"
            )


def check_folder(folder: Path | None, variable: str) -> Path:
    """Checks the folder of executables to write to.

    Args:
        variable: the environment variable that names its default.

    Raises:
        ValueError: there is none, or it cannot be written.
    """
    if folder is None:
        raise ValueError(f"name a folder: --executables or ${variable}")
    files.check_output_folder(folder)
    return folder


def _move(verb: str, place: str, folder: Path) -> None:
    """Pulls or pushes artifacts, and prints their names."""
    from runtime import sharing

    try:
        moved = sharing.pull(place, folder) if verb == "pull" else sharing.push(folder, place)
    except (OSError, ImportError, ValueError) as error:
        raise RunError(f"--{verb} {place}: {error}") from error
    for name in moved:
        print(f"{verb}ed {name}")
    print(f"{verb}ed {len(moved)} artifacts; the others were there")
