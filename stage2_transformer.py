#!/usr/bin/env python3
"""Stage 2: embeddings to latents, the denoising loop of the transformer.

Reads stage1_embeddings.safetensors, writes stage2_latents.safetensors.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import utils
from runtime import processes
from runtime.devices import start_jax
from runtime.errors import checking_input
from runtime.progress import Timings, progress
from stages import files as stage_files
from utils import ArgumentParser

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import jax
    import numpy as np

    from cogvideox.denoising.program import Denoiser
    from cogvideox.denoising.scheduler import Schedule
    from cogvideox.model.folder import ModelFolder, StoredTensor
    from cogvideox.model.settings import DenoisingSettings, LatentShape

STAGE = "stage2_transformer"
CHECKPOINT_FILE = "stage2_checkpoint.safetensors"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        "Denoises latents from the embeddings of stage 1, on all devices of this machine.",
        "  python stage2_transformer.py\n"
        "  python stage2_transformer.py --num_inference_steps 30 --guidance_scale 7 --seed 1\n"
        "  python stage2_transformer.py --height 720 --width 1280 --dp 2 --tp 4",
    )
    utils.add_folders(parser)
    utils.add_model(parser, default=None)
    add_arguments(parser)
    add_profile(parser)
    utils.add_mesh(parser)
    utils.add_distributed(parser)
    utils.add_dtype(parser)
    utils.add_executables(parser)
    return parser.parse_args(argv)


def add_profile(parser: ArgumentParser) -> None:
    parser.add_argument("--profile", type=Path, help="write a JAX profile of the loop here")


def add_arguments(parser: ArgumentParser) -> None:
    """The arguments that only this stage has, but for the profile."""
    parser.add_argument(
        "--num_inference_steps",
        type=utils.integer(1),
        help="denoising steps (default: the model's, 50 for the published ones)",
    )
    parser.add_argument(
        "--guidance_scale",
        type=utils.number(0, 1000),
        help="classifier-free guidance; 1 or less turns it off (default: the model's, 6)",
    )
    parser.add_argument(
        "--use_dynamic_cfg", action="store_true", help="vary the guidance scale with the timestep"
    )
    parser.add_argument(
        "--scheduler", choices=("dpm", "ddim"), help="default: the one in the model's folder"
    )
    parser.add_argument("--height", type=int, help="pixels (default: the model's)")
    parser.add_argument("--width", type=int, help="pixels (default: the model's)")
    parser.add_argument("--num_frames", "--frames", type=int, help="default: the model's")
    parser.add_argument(
        "--fps", type=utils.integer(1, 240), help="frames a second (default: the model's)"
    )
    parser.add_argument("--seed", type=utils.integer(0, 2**64 - 1), default=42, help="of the noise")
    parser.add_argument(
        "--allow_unsupported",
        action="store_true",
        help="compute sizes and frame counts that the model was not trained for",
    )
    parser.add_argument(
        "--attention",
        choices=("auto", "splash", "cudnn", "reference"),
        default="auto",
        help="kernel; auto takes splash on TPU, cudnn on NVIDIA GPUs, reference on CPU",
    )
    parser.add_argument(
        "--checkpoint_every",
        type=utils.integer(1),
        help="save the loop's state every so many steps; the same command goes on from there "
        "(default: never)",
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked run: what to denoise, with which program, on which devices."""

    settings: DenoisingSettings
    padding_frames: int  # leading latent frames to drop
    denoiser: Denoiser
    schedule: Schedule


def make_plan(arguments: argparse.Namespace, model: ModelFolder, batch: int, tokens: int) -> Plan:
    """Checks everything that needs no weight: sizes, steps, mesh, attention, weight headers.

    Args:
        batch: how many prompts.
        tokens: per prompt.

    Raises:
        ValueError: what cannot be computed, and the nearest that can.
    """
    from cogvideox.model.settings import DenoisingSettings, complete_settings, latent_shape

    fields = dataclasses.fields(DenoisingSettings)
    wishes = {field.name: getattr(arguments, field.name) for field in fields}
    settings = complete_settings(wishes, model, any_size=arguments.allow_unsupported)
    latents, padding = latent_shape(settings, model, batch)
    with ThreadPoolExecutor(1) as background:
        # Devices take seconds to start, in which everything is imported and checked that they do
        # not decide.
        starting = background.submit(start_jax, arguments.dtype)
        from cogvideox.denoising.scheduler import make_schedule
        from cogvideox.model.folder import stored_tensors
        from cogvideox.transformer.parameters import check_weights

        weights = stored_tensors(model.path / "transformer")
        check_weights(model.transformer, weights)
        schedule = make_schedule(settings, model.scheduler)
        starting.result()

    import jax

    denoiser = make_denoiser(
        arguments, model, weights, latents, tokens, settings.guided, jax.devices()
    )
    return Plan(settings, padding, denoiser, schedule)


def make_denoiser(
    arguments: argparse.Namespace,
    model: ModelFolder,
    weights: Mapping[str, StoredTensor],
    latents: LatentShape,
    tokens: int,
    guided: bool,
    devices: Sequence[jax.Device],
) -> Denoiser:
    """The program for `devices`, with the mesh and the attention that `arguments` ask for.

    Raises:
        ValueError: no such mesh fits, or the devices cannot run that attention.
    """
    from cogvideox.denoising.program import Denoiser
    from cogvideox.transformer.attention import choose_attention
    from runtime.mesh import choose_mesh, make_mesh

    config = model.transformer
    attention = choose_attention(arguments.attention, devices[0].platform, arguments.dtype)
    mesh = choose_mesh(
        arguments.dp,
        arguments.sp,
        arguments.tp,
        batch=latents.batch * (2 if guided else 1),
        num_heads=config.num_attention_heads,
        num_devices=len(devices),
    )
    return Denoiser(
        config=config,
        weights=weights,
        latents=latents,
        text_tokens=tokens,
        guided=guided,
        dtype=arguments.dtype,
        mesh=make_mesh(mesh, devices),
        attention=attention,
    )


def run(arguments: argparse.Namespace) -> None:
    utils.join_processes(arguments)
    from cogvideox.denoising.noise import drawing_beside

    with drawing_beside():
        _run(arguments)


def _run(arguments: argparse.Namespace) -> None:
    timings, output_dir = Timings(), arguments.output_dir or arguments.input_dir
    arguments.input_dir = processes.folder_of_first(
        arguments.input_dir, [stage_files.CONFIG_FILE, stage_files.EMBEDDINGS_FILE]
    )
    with checking_input():
        embeddings, model = open_embeddings(arguments)
        utils.check_executables(arguments.executables)
        stage_files.check_output_folder(output_dir, stage_files.LATENTS_FILE)
        if arguments.profile:
            stage_files.check_output_folder(arguments.profile)
        batch, tokens, _ = embeddings.shapes["prompt_embeds"]
        plan = make_plan(arguments, model, batch, tokens)
    mesh, attention = dict(plan.denoiser.mesh.shape), plan.denoiser.attention.name
    print(f"{plan.settings.describe()}\nmesh {mesh}, attention {attention}, {arguments.dtype}")

    from runtime.compilation import CompilationLog

    compilations = CompilationLog()
    with ThreadPoolExecutor(1) as background:
        compiling = background.submit(plan.denoiser.compile, arguments.executables)
        with timings.phase("load"):
            parameters = plan.denoiser.load(arguments.executables)
            prompt_embeds = plan.denoiser.prompt_embeds(stage_files.read_tensors(embeddings))
        with timings.phase("compile"):  # what loading did not hide
            step = compiling.result()
    print(f"stage 2: {compilations.sentence()}")

    section = make_section(plan, arguments, model, embeddings)
    with timings.phase("run"), _profile(arguments.profile):
        folder = processes.folder_of_first(output_dir, [CHECKPOINT_FILE])
        checkpoints = Checkpoints(folder, section, arguments.checkpoint_every)
        latents = denoise(plan, step, parameters, prompt_embeds, checkpoints)
    if not processes.is_first():
        return
    with timings.phase("save"):
        path = save(latents, section, arguments.input_dir, output_dir)
    print(f"{path}: latents {list(latents.shape)}")
    timings.report(output_dir / "stage2_timings.json", compilation=compilations.summary())


def _profile(folder: Path | None) -> Any:
    import jax

    traced = folder and processes.is_first()
    return jax.profiler.trace(folder) if traced else nullcontext()


def make_section(
    plan: Plan, arguments: argparse.Namespace, model: ModelFolder, embeddings: stage_files.StageFile
) -> dict[str, Any]:
    """What generation_config.json says of this stage."""
    import jax

    return stage_files.make_section(
        {
            "model_id": model.model_id,
            "revision": model.revision,
            "embeddings": embeddings.section["fingerprint"],
            **dataclasses.asdict(plan.settings),
            "dtype": arguments.dtype,
        },
        mesh=dict(plan.denoiser.mesh.shape),
        attention=plan.denoiser.attention.name,
        device=jax.devices()[0].device_kind,
        guidance_scales=list(plan.schedule.guidance_scales),
    )


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Where and when the loop's state is saved, so that a run goes on where it was killed.

    Attributes:
        section: of the run; the state of another run is not gone on from.
        every: steps from one to the next; None saves and reads none.
        stop: asked after each step; the state is saved and the run ends once it says so.
    """

    folder: Path
    section: dict[str, Any]
    every: int | None
    stop: Callable[[], bool] = lambda: False

    @property
    def path(self) -> Path:
        return self.folder / CHECKPOINT_FILE


class StoppedBetweenSteps(Exception):
    """`Checkpoints.stop` said so."""


def denoise(
    plan: Plan,
    step: Callable,
    parameters: Any,
    prompt_embeds: jax.Array,
    checkpoints: Checkpoints,
    bar: Callable[..., Iterable] = progress,
) -> np.ndarray:
    """Runs the loop, from a checkpoint if there is one.

    Args:
        bar: shows progress, as `progress` does.

    Returns:
        Latents [B, C, T, H, W] without the padding frames, on the host.

    Raises:
        StoppedBetweenSteps: `checkpoints.stop` said so.
    """
    from cogvideox.denoising.loop_checkpoint import read_checkpoint, write_checkpoint

    fingerprint, total = checkpoints.section["fingerprint"], len(plan.schedule.timesteps)
    start = read_checkpoint(checkpoints.path, fingerprint) if checkpoints.every else None
    if start:
        print(f"going on from {checkpoints.path}, {start.steps} of {total} steps done")
    states = plan.denoiser.run(
        step, parameters, prompt_embeds, plan.schedule, plan.settings.seed, start
    )
    initial = start.steps if start else 0
    for state in bar(states, total=total, initial=initial, what="denoising"):
        stop = checkpoints.stop() and state.steps < total
        if checkpoints.every and state.steps < total:
            if stop or state.steps % checkpoints.every == 0:
                checkpoint = plan.denoiser.to_host(state)
                if processes.is_first():
                    write_checkpoint(checkpoints.path, checkpoint, fingerprint)
        if stop:
            raise StoppedBetweenSteps
    # diffusers' [B, T, C, H, W] without the padding frames, turned as the VAE wants it.
    latents = plan.denoiser.to_host(state).latents
    return latents[:, plan.padding_frames :].swapaxes(1, 2)


def save(latents: np.ndarray, section: dict[str, Any], input_dir: Path, output_dir: Path) -> Path:
    """Writes this stage's file and section, and removes its checkpoint."""
    tensors = {"latents": latents}
    stage_files.check_finite(tensors, STAGE)
    path = output_dir / stage_files.LATENTS_FILE
    stage_files.write_stage_file(path, STAGE, tensors, section, vae_scaling_applied="false")
    stage_files.record_section(output_dir, STAGE, section, inherited=input_dir)
    (output_dir / CHECKPOINT_FILE).unlink(missing_ok=True)
    return path


def open_embeddings(arguments: argparse.Namespace) -> tuple[stage_files.StageFile, ModelFolder]:
    """The checked header of stage 1's file, and the model it was made with."""
    from cogvideox.model.settings import text_tokens

    names = {"prompt_embeds", "negative_prompt_embeds"}
    config = stage_files.read_config(arguments.input_dir)
    file = stage_files.open_stage_file(
        arguments.input_dir, stage_files.EMBEDDINGS_FILE, "stage1_text_encoder", config, names
    )
    model = stage_files.find_same_model(arguments.model_id, file, ["transformer", "scheduler"])
    transformer = model.transformer
    shape = file.shapes["prompt_embeds"]
    if len(shape) != 3 or 0 in shape or file.shapes["negative_prompt_embeds"] != shape:
        raise ValueError(f"{file.path} does not hold two equal [batch, tokens, width] tensors")
    _, tokens, width = shape
    text_tokens(tokens, transformer)
    if width != transformer.text_embed_dim:
        raise ValueError(
            f"{file.path} holds embeddings of {width}, the model takes {transformer.text_embed_dim}"
        )
    return file, model


if __name__ == "__main__":
    utils.run_main(lambda: run(parse_arguments()))
