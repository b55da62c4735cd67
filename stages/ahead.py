"""Compiles the stages' programs before they are needed, also for an absent machine."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from runtime.chips import MACHINES
from runtime.devices import start_jax
from runtime.errors import InputError, RunError
from runtime.progress import progress
from stages import condition, decode, denoise, files
from stages.speed import NamedSpeed, resolve
from stages.steps import denoisers_of, programs_for

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
        stages: some of 1, 2, 3; of stage 1 it is the encoder of an image or a video.
        sizes: (height, width, frames) each; None takes the model's.
        topology: one of TOPOLOGIES.
        batch: number of prompts.
        frames: what stage 3 returns.
        speed: values of stage 2's option, whose programs are compiled.
        pull: where to copy artifacts from first.
        push: where to copy all artifacts to at the end.
        compile_all: with a plan, derive nothing.
        trust_executables: digest of the artifacts to pull.
    """

    model_id: str
    stages: Sequence[int]
    decoder: str
    encoder: str
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
    speed: Sequence[str]
    allow_unsupported: bool
    executables: Path | None
    pull: str | None
    push: str | None
    compile_all: bool
    trust_executables: str | None


def compile_sizes(options: AheadOptions, folder: Path, targets: Sequence[Target]) -> None:
    """Pulls artifacts, compiles every target into `folder`, and pushes; prints what was made.

    Raises:
        InputError: the source of --pull is refused, or there is nothing to push.
        RunError: artifacts cannot be pulled, written or pushed.
    """
    from runtime import sharing
    from runtime.trusted_folders import make_folder

    make_folder(folder)
    if options.pull:
        pulled = sharing.pull(options.pull, folder, options.trust_executables)
        _report("pulled", pulled)
    made = [compile_target(options, target, folder) for target in targets]
    missing = [name for names in made for name in names if not (folder / name).exists()]
    if missing:
        raise RunError(
            f"{folder} was removed or changed while this ran: {len(missing)} of the executables "
            "are not there; run the same command again"
        )
    digest = folder_digest(folder)
    if options.push:
        _report("pushed", sharing.push(folder, options.push))
    print(f"digest of {folder}, for --trust_executables: {digest}")


def folder_digest(folder: Path) -> str:
    """The digest of the manifests of a folder.

    Raises:
        InputError: it holds none.
    """
    from runtime.artifacts import Refused, read_manifest_bytes
    from runtime.files import open_regular
    from runtime.trusted_folders import manifest_digest

    manifests = {}
    for path in sorted(folder.glob("*.json")):
        try:
            text = read_manifest_bytes(path.name, lambda name: open_regular(folder / name))
        except (Refused, InputError) as refused:
            print(f"left out of the digest: {refused}")
            continue
        manifests[path.name] = text
    if not manifests:
        raise InputError(f"{folder} holds no executables")
    return manifest_digest(manifests)


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
    from cogvideox.model.settings import complete_settings, likely_condition, text_tokens

    model = find_model(options.model_id, [])
    tokens = text_tokens(
        options.max_sequence_length, model.transformer, any_length=options.allow_unsupported
    )
    settings = []
    for height, width, num_frames in options.sizes or [(None, None, None)]:
        wishes: dict[str, Any] = {"height": height, "width": width, "num_frames": num_frames}
        wishes |= {"use_dynamic_cfg": False, "seed": 0}
        wishes |= {"guidance_scale": 1.0} if options.unguided else {}
        start, any_size = likely_condition(model, height, width), options.allow_unsupported
        settings.append(complete_settings(wishes, model, any_size=any_size, condition=start))
    devices = _devices(options)
    return [_make_target(options, model, tokens, one, devices) for one in settings]


def _devices(options: AheadOptions) -> Sequence[Device]:
    if options.topology == LOCAL:
        start_jax(options.dtype)
        import jax

        return jax.devices()
    from runtime.topology import machine_devices

    devices = list(machine_devices(options.topology).flat)
    start_jax(options.dtype, devices)
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
    denoising = denoise.DenoiseOptions(
        **dict.fromkeys(("input_dir", "output_dir"), Path()),
        dtype=options.dtype,
        seed=settings.seed,
        attention=options.attention,
        dp=options.dp,
        sp=options.sp,
        tp=options.tp,
    )
    denoiser = denoise.make_denoiser(
        denoising, model, {}, latents, tokens, settings.guided, devices
    )
    if 2 in options.stages:
        for name in options.speed:
            lossy = resolve(NamedSpeed(name), settings, model)
            denoisers_of(denoiser, lossy, settings.num_inference_steps)  # raises ValueError
    decoding = decode.DecodeOptions(
        input_dir=Path(), dtype=options.dtype, decoder=options.decoder, dp=options.dp, tp=options.tp
    )
    decoder = decode.make_decoder(decoding, model, decode.make_mesh(decoding, devices))
    # An image-to-video model starts from one frame, another model from a video of all.
    frames = 1 if model.transformer.image_to_video else settings.num_frames
    return Target(
        settings,
        denoise.saved_shape(latents, padding),
        denoiser=denoiser if 2 in options.stages else None,
        decoder=decoder if 3 in options.stages else None,
        encoder=condition.encode_program(options.encoder, model, devices, options.dtype)
        if 1 in options.stages
        else None,
        encoded=(1, frames, settings.height, settings.width, 3),
    )


def compile_target(options: AheadOptions, target: Target, folder: Path) -> list[str]:
    """Compiles the programs of one size into `folder`, and prints what was made.

    Returns:
        The names of their manifests.

    Raises:
        RunError: the folder cannot be written, or was removed meanwhile.
    """
    from runtime.artifacts import Refused, read_artifact
    from runtime.executables import compile_into
    from runtime.files import open_regular

    parts = []
    if target.encoder:
        parts.append((target.encoder.programs(target.encoded), 1))
    if target.denoiser:
        parts.append((programs_for(target.denoiser, target.settings, options.speed), 1))
    if target.decoder:
        programs = target.decoder.programs(target.latents, output=options.frames)
        parts.append((programs, target.decoder.compiler_threads))
    for programs, threads in parts:
        made = compile_into(programs, folder, threads=threads)
        for program in programs:
            path = folder / program.manifest_name
            try:
                artifact = read_artifact(path.name, lambda name: open_regular(folder / name))
            except Refused as refused:
                raise RunError(f"{folder} was changed while this ran: {refused}") from refused
            manifest = artifact.manifest
            hbm, size = manifest["hbm_bytes_per_device"]["total"], manifest["executable"]["bytes"]
            seconds = f"compiled in {manifest['compile_seconds']} s"
            print(
                f"{path.name}: {seconds if path.name in made else 'already there'}, "
                f"{size / 1e6:.2f} MB, {hbm / 1e9:.2f} GB a device"
            )
    return [program.manifest_name for programs, _ in parts for program in programs]


def check_folder(options: AheadOptions, variable: str, *, push_only: bool) -> Path:
    """Checks the folder of executables to write to, or to push.

    Args:
        variable: the environment variable that names its default.
        push_only: nothing will be pulled or compiled.

    Raises:
        ValueError: there is none, it cannot be written or read, or others can write it.
    """
    folder = options.executables
    if folder is None:
        raise ValueError(f"name a folder: --executables or ${variable}")
    if push_only:
        if not folder.is_dir():
            raise ValueError(f"--executables {folder} is not a folder, so there is nothing to push")
        folder_digest(folder)
    files.check_output_folder(folder)
    if folder.is_dir():
        files.check_executables(folder)
    return folder


def _report(verb: str, names: Sequence[str]) -> None:
    for name in names:
        print(f"{verb} {name}")
    print(f"{verb} {len(names)} artifacts; the others were there")
