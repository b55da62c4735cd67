#!/usr/bin/env python3
"""Compiles the stages' programs before they are needed, for this machine or a TPU elsewhere.

Writes executables and their manifests into a folder that the stages read with --executables; or,
with --plan, only says what memory and time each size and mesh would take.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import stage2_transformer as stage2
import utils
from runtime.chips import MACHINES
from runtime.devices import start_jax
from runtime.errors import RunError, checking_input
from runtime.progress import progress
from stages import files as stage_files
from utils import ArgumentParser

if TYPE_CHECKING:
    from collections.abc import Sequence

    import jax

    from cogvideox.denoising.program import Denoiser
    from cogvideox.model.folder import ModelFolder
    from cogvideox.model.settings import DenoisingSettings
    from cogvideox.vae.decode import Decoder

TOPOLOGIES = ("local", *MACHINES)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        "Compiles stages 2 and 3 ahead of time. Needs the model's JSON files, no weights, and for "
        "a TPU topology no TPU.",
        "  python compile_ahead.py --topology v6e-8 --sizes 768x1360x81,720x1280x81\n"
        "  python compile_ahead.py --topology v6e-8 --sizes 768x1360x81 --plan\n"
        "  python compile_ahead.py --pull hf://me/cogvideox-v6e-8 --executables executables\n"
        "  python compile_ahead.py --push gs://bucket/executables --executables executables",
    )
    utils.add_model(parser, default=utils.DEFAULT_MODEL)
    parser.add_argument(
        "--stages", type=_stages, default="2,3", help="which to compile, separated by commas"
    )
    parser.add_argument(
        "--decoder", choices=("torchax", "flax"), default="torchax", help="VAE of stage 3"
    )
    parser.add_argument(
        "--sizes",
        type=_sizes,
        help="height x width x frames, several separated by commas (default: the model's)",
    )
    parser.add_argument(
        "--topology", choices=TOPOLOGIES, default="local", help="machine to compile for"
    )
    utils.add_mesh(parser)
    utils.add_dtype(parser)
    parser.add_argument(
        "--attention",
        choices=("auto", "splash", "cudnn", "reference"),
        default="auto",
        help="kernel of stage 2, as in stage2_transformer.py",
    )
    parser.add_argument("--batch", type=utils.integer(1), default=1, help="prompts at once")
    parser.add_argument("--unguided", action="store_true", help="for --guidance_scale 1 or less")
    parser.add_argument("--max_sequence_length", type=utils.integer(1, 4096), help="as in stage 1")
    parser.add_argument(
        "--frames",
        choices=("uint8", "float32"),
        default="uint8",
        help="what stage 3 puts out; float32 is for --output_video NAME.npy",
    )
    parser.add_argument(
        "--allow_unsupported",
        action="store_true",
        help="sizes and frame counts that the model was not trained for",
    )
    utils.add_executables(parser)
    parser.add_argument(
        "--pull",
        metavar="SOURCE",
        help="first copy artifacts from a folder, bucket or hf://owner/repository (only from those "
        "you trust: artifacts are code); without --sizes, compile nothing",
    )
    parser.add_argument(
        "--push",
        metavar="DESTINATION",
        help="at last copy all artifacts there; without --sizes, compile nothing",
    )
    parser.add_argument("--plan", action="store_true", help="report memory and time; write nothing")
    parser.add_argument(
        "--compile_all",
        action="store_true",
        help="with --plan, compile every mesh of every size; otherwise one mesh a size and the "
        "decoder of one size are compiled, and the others derived from them",
    )
    parser.add_argument("--json", action="store_true", help="with --plan, print JSON")
    return parser.parse_args(argv)


def _stages(text: str) -> tuple[int, ...]:
    stages = tuple(sorted({int(part) for part in text.split(",") if part in ("2", "3")}))
    if not stages or len(stages) != len(text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not 2, 3 or 2,3")
    return stages


def _sizes(text: str) -> list[tuple[int, int, int]]:
    sizes = [tuple(part.split("x")) for part in text.split(",")]
    if not all(len(size) == 3 and all(n.isdecimal() for n in size) for size in sizes):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not height x width x frames, such as 768x1360x81,720x1280x81"
        )
    return [tuple(map(int, size)) for size in sizes]


@dataclasses.dataclass(frozen=True)
class Target:
    """The programs of one size on one machine.

    Attributes:
        latents: what stage 3 decodes, [B, C, T, H, W].
    """

    settings: DenoisingSettings
    latents: tuple[int, ...]
    denoiser: Denoiser
    decoder: Decoder


def run(arguments: argparse.Namespace) -> None:
    if arguments.plan:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the plan
            plans = make_plans(arguments)
        from stages.plan import table

        print(json.dumps(plans, indent=2) if arguments.json else table(plans))
        return
    with checking_input():
        _check(arguments)
        moves_only = arguments.sizes is None and (arguments.pull or arguments.push)
        targets = [] if moves_only else make_targets(arguments)
    if arguments.pull:
        _move("pull", arguments.pull, arguments.executables)
    for target in targets:
        compile_target(target, arguments)
    if arguments.push:
        _move("push", arguments.push, arguments.executables)


def make_plans(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A plan for every size."""
    with checking_input():
        _check(arguments)
        targets = make_targets(arguments)

    from stages import plan

    requests = [
        plan.Request(
            target.settings,
            target.latents,
            denoiser=target.denoiser if 2 in arguments.stages else None,
            decoder=target.decoder if 3 in arguments.stages else None,
        )
        for target in targets
    ]
    # A GPU's compiler times candidates on the device, where two at once would disturb each other.
    on_gpu = targets[0].denoiser.mesh.devices.flat[0].platform == "gpu"
    threads = 1 if on_gpu else len(os.sched_getaffinity(0))
    plans = plan.make_plans(requests, compile_all=arguments.compile_all, threads=threads)
    return list(progress(plans, total=len(requests), what="planning", unit="size"))


def _check(arguments: argparse.Namespace) -> None:
    if arguments.plan:
        if arguments.pull or arguments.push:
            raise ValueError("--plan writes nothing; leave --pull and --push out")
        return
    if arguments.json or arguments.compile_all:
        raise ValueError("--json and --compile_all are for --plan")
    if arguments.executables is None:
        raise ValueError(f"name a folder: --executables or ${utils.EXECUTABLES_VARIABLE}")
    stage_files.check_output_folder(arguments.executables)


def make_targets(arguments: argparse.Namespace) -> list[Target]:
    """The programs of every size asked for; compiles nothing.

    Raises:
        ValueError: a size, mesh or attention that cannot be computed.
    """
    from cogvideox.model.folder import find_model
    from cogvideox.model.settings import complete_settings, text_tokens

    model = find_model(arguments.model_id, [])
    tokens = text_tokens(arguments.max_sequence_length, model.transformer)
    settings = []
    for size in arguments.sizes or [(None, None, None)]:
        wishes = dict(zip(("height", "width", "num_frames"), size, strict=True))
        wishes |= {"use_dynamic_cfg": False, "seed": 0}
        wishes |= {"guidance_scale": 1.0} if arguments.unguided else {}
        settings.append(complete_settings(wishes, model, any_size=arguments.allow_unsupported))
    devices = _devices(arguments)
    return [_make_target(arguments, model, tokens, one, devices) for one in settings]


def _devices(arguments: argparse.Namespace) -> Sequence[jax.Device]:
    if arguments.topology == "local":
        start_jax(arguments.dtype)
        import jax

        return jax.devices()
    from runtime.topology import machine_devices

    devices = list(machine_devices(arguments.topology).flat)
    start_jax(arguments.dtype)
    return devices


def _make_target(
    arguments: argparse.Namespace,
    model: ModelFolder,
    tokens: int,
    settings: DenoisingSettings,
    devices: Sequence[jax.Device],
) -> Target:
    from cogvideox.model.settings import latent_shape
    from cogvideox.vae.decode import make_decoder
    from runtime.mesh import all_devices, make_mesh

    latents, padding = latent_shape(settings, model, arguments.batch)
    denoiser = stage2.make_denoiser(arguments, model, {}, latents, tokens, settings.guided, devices)
    mesh = make_mesh(all_devices(arguments.dp, arguments.tp, len(devices)), devices)
    decoder = make_decoder(f"vae_{arguments.decoder}", model.vae, mesh, arguments.dtype)
    batch, frames, channels, *size = latents.sizes
    return Target(settings, (batch, channels, frames - padding, *size), denoiser, decoder)


def compile_target(target: Target, arguments: argparse.Namespace) -> None:
    """Compiles the programs of one size into the folder, and says what was made."""
    from runtime.artifacts import parse_manifest
    from runtime.executables import compile_into

    parts = []
    if 2 in arguments.stages:
        parts.append((target.denoiser.programs, 1))
    if 3 in arguments.stages:
        programs = target.decoder.programs(target.latents, output=arguments.frames)
        parts.append((programs, target.decoder.compiler_threads))
    for programs, threads in parts:
        made = compile_into(programs, arguments.executables, threads=threads)
        for program in programs:
            path = arguments.executables / program.manifest_name
            manifest = parse_manifest(path.name, path.read_bytes())
            hbm, size = manifest["hbm_bytes_per_device"]["total"], manifest["executable"]["bytes"]
            seconds = f"compiled in {manifest['compile_seconds']} s"
            print(
                f"{path.name}: {seconds if path.name in made else 'already there'}, "
                f"{size / 1e6:.2f} MB, {hbm / 1e9:.2f} GB a device"
            )


def _move(verb: str, place: str, folder: Path) -> None:
    """Pulls or pushes artifacts, and says which."""
    from runtime import sharing

    try:
        moved = sharing.pull(place, folder) if verb == "pull" else sharing.push(folder, place)
    except (OSError, ImportError, ValueError) as error:
        raise RunError(f"--{verb} {place}: {error}") from error
    for name in moved:
        print(f"{verb}ed {name}")
    print(f"{verb}ed {len(moved)} artifacts; the others were there")


if __name__ == "__main__":
    utils.run_main(lambda: run(parse_arguments()))
