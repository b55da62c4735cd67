#!/usr/bin/env python3
"""Stage 3: latents to video, with diffusers' VAE decoder through TorchAx.

Reads stage2_latents.safetensors; writes the video and a contact sheet beside it.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
    import numpy as np

    from cogvideox.model.folder import ModelFolder

STAGE = "stage3_vae_decoder"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        "Decodes the latents of stage 2, their width split over all devices of this machine.",
        "  python stage3_vae_decoder.py\n"
        "  python stage3_vae_decoder.py --output_video frames/   # a folder of PNG images\n"
        "  python stage3_vae_decoder_flax.py --output_video video.webp --quality 9",
    )
    parser.add_argument(
        "--input_dir", type=Path, default=utils.DEFAULT_FOLDER, help="folder of stage 2's files"
    )
    utils.add_model(parser, default=None)
    add_output(parser)
    add_arguments(parser)
    utils.add_mesh(parser, ("dp", "tp"))
    utils.add_distributed(parser)
    parser.add_argument("--fps", type=utils.integer(1, 240), help="default: the one of stage 2")
    utils.add_dtype(parser)
    utils.add_executables(parser)
    return parser.parse_args(argv)


def add_output(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--output_video",
        type=Path,
        help=".mp4, .gif, .webp, .npy (float32, exact), or a folder of PNG frames "
        f"(default: {stage_files.VIDEO_FILE} in the folder of the latents)",
    )


def add_arguments(parser: ArgumentParser) -> None:
    """The arguments that only this stage has, but for the output."""
    parser.add_argument(
        "--quality", type=utils.integer(0, 10), help="of .mp4 and .webp, 10 is best (default: 7)"
    )
    parser.add_argument(
        "--no_metadata", action="store_true", help="leave the settings out of the mp4"
    )


def add_decoder(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--decoder", choices=("torchax", "flax"), default="torchax", help="VAE of stage 3"
    )


def contact_sheet(video: Path) -> Path:
    """Where the contact sheet of a video goes."""
    return video.with_name(f"{video.stem}_contact_sheet.png")


def check(
    arguments: argparse.Namespace,
    model: ModelFolder,
    folder: Path,
    latents: tuple[int, ...],
    fps: int,
) -> list[Path]:
    """Checks the VAE's files and where the videos of a batch go: one path a prompt.

    Args:
        folder: for a video that is not named.
        latents: their shape [B, C, T, H, W].

    Raises:
        ValueError: an unknown suffix, a place that cannot be written, weights that do not fit.
    """
    from cogvideox.model.settings import decoded_frames
    from cogvideox.vae.weights import stored_weights
    from cogvideox.video.formats import check_output_path, wants_float

    batch, channels, latent_frames, height, width = latents
    vae = model.vae
    if channels != vae.latent_channels:
        raise ValueError(f"latents of {channels} channels, a VAE of {vae.latent_channels}")
    stored_weights(model.path / "vae", vae)
    videos = stage_files.numbered(arguments.output_video or folder / stage_files.VIDEO_FILE, batch)
    values = 3 * height * width * vae.spatial_scale**2
    values *= decoded_frames(latent_frames, vae.temporal_compression_ratio)
    for video in videos:
        if processes.is_first():
            check_output_path(video, fps=fps, quality=arguments.quality)
        needed = values * (4 if wants_float(video) else 1)
        stage_files.check_output_folder(
            video.parent, contact_sheet(video).name, needed_bytes=needed
        )
        if video.exists():
            print(f"will replace {video}")
    return videos


def run(arguments: argparse.Namespace, decoder_name: str) -> None:
    """Decodes with `decoder_name`, "vae_torchax" or "vae_flax", a module in cogvideox/."""
    utils.join_processes(arguments)
    timings = Timings()
    arguments.input_dir = processes.folder_of_first(
        arguments.input_dir, [stage_files.CONFIG_FILE, stage_files.LATENTS_FILE]
    )
    with checking_input():
        utils.check_executables(arguments.executables)
        config, latents_file = open_latents(arguments)
        shape = latents_file.shapes["latents"]
        fps = arguments.fps or latents_file.section["fps"]
        model = stage_files.find_same_model(arguments.model_id, latents_file, ["vae"])
        videos = check(arguments, model, arguments.input_dir, shape, fps)
        start_jax(arguments.dtype)

        import jax

        from cogvideox.vae.decode import make_decoder
        from runtime.mesh import all_devices, make_mesh

        mesh = make_mesh(all_devices(arguments.dp, arguments.tp, jax.device_count()))
        decoder = make_decoder(decoder_name, model.vae, mesh, arguments.dtype)

    from cogvideox.model.settings import decoded_frames
    from cogvideox.video.formats import wants_float
    from runtime.compilation import CompilationLog

    compilations = CompilationLog()
    output = "float32" if wants_float(videos[0]) else "uint8"
    with ThreadPoolExecutor(1) as background:
        compiling = background.submit(
            decoder.compile, shape, output=output, executables=arguments.executables
        )
        with timings.phase("load"):
            decoder.load(model.path / "vae")
            latents = stage_files.read_tensors(latents_file)["latents"]
        with timings.phase("compile"):  # what loading did not hide
            compiling.result()
    print(f"stage 3: {compilations.sentence()}")

    section = make_section(arguments, model, latents_file, videos, dict(mesh.shape), decoder_name)
    num_frames = decoded_frames(shape[2], model.vae.temporal_compression_ratio)
    waited = Timings()
    with timings.phase("run and save"):
        recorded = {**config, STAGE: section}
        batches = _with_first_timed(decoder.decode(latents, output=output), waited)
        batches = _shown(batches, num_frames)
        if not processes.is_first():
            collections.deque(batches, maxlen=0)
            return
        write_videos(batches, num_frames, videos, arguments, recorded)
        stage_files.record_section(
            arguments.input_dir, STAGE, section, inherited=arguments.input_dir
        )
    # The encoder works from the first frames on, while the devices decode more: the two add up to
    # more than both took.
    timings.at_once["run and save"] = {
        "decoding": round(decoder.decode_seconds, 4),
        "saving": round(timings.seconds["run and save"] - waited.seconds["first frames"], 4),
    }
    for video in videos:
        print(f"video: {video}\ncontact sheet: {contact_sheet(video)}")
    report = videos[0].with_name(f"{videos[0].stem}_timings.json")
    timings.report(report, compilation=compilations.summary())


def make_section(
    arguments: argparse.Namespace,
    model: ModelFolder,
    latents_file: stage_files.StageFile,
    videos: list[Path],
    mesh: dict[str, int],
    decoder_name: str,
) -> dict[str, Any]:
    """What generation_config.json says of this stage."""
    return stage_files.make_section(
        {
            "model_id": model.model_id,
            "revision": model.revision,
            "latents": latents_file.section["fingerprint"],
            "output_video": [str(video) for video in videos],
            "fps": arguments.fps or latents_file.section["fps"],
            "quality": arguments.quality,
            "dtype": arguments.dtype,
        },
        mesh=mesh,
        decoder=decoder_name,
    )


def open_latents(arguments: argparse.Namespace) -> tuple[dict, stage_files.StageFile]:
    """The config and the checked header of stage 2's file."""
    config = stage_files.read_config(arguments.input_dir)
    file = stage_files.open_stage_file(
        arguments.input_dir, stage_files.LATENTS_FILE, "stage2_transformer", config, {"latents"}
    )
    stage_files.check_inputs_are_current(file, config, "embeddings", "stage1_text_encoder")
    return config, file


def _with_first_timed(batches: Iterator[np.ndarray], timings: Timings) -> Iterator[np.ndarray]:
    """The same batches; `timings` learns how long the first was waited for."""
    with timings.phase("first frames"):
        first = next(batches)
    yield first
    yield from batches


def _shown(batches: Iterable[np.ndarray], num_frames: int) -> Iterator[np.ndarray]:
    """The batches [B, f, height, width, 3], with a progress bar of frames."""
    with progress(total=num_frames, what="decoding", unit="frame") as bar:
        for frames in batches:
            yield frames
            bar.update(frames.shape[1])


def write_videos(
    batches: Iterable[np.ndarray],
    num_frames: int,
    videos: list[Path],
    arguments: argparse.Namespace,
    recorded: dict,
) -> None:
    """Streams the frames of every video of the batch to its file; contact sheets at the end."""
    from cogvideox.model.settings import DenoisingSettings
    from cogvideox.video.contact_sheet import FrameSampler, write_contact_sheet
    from cogvideox.video.writing import open_video_writer

    fps = recorded[STAGE]["fps"]
    comment = None if arguments.no_metadata else json.dumps(recorded, ensure_ascii=False)
    samplers = [FrameSampler(num_frames) for _ in videos]
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(
                open_video_writer(
                    video,
                    fps=fps,
                    num_frames=num_frames,
                    quality=arguments.quality,
                    comment=comment,
                )
            )
            for video in videos
        ]
        for frames in batches:
            for writer, sampler, own in zip(writers, samplers, frames, strict=True):
                writer.write(own)
                sampler.add(own)
    made = recorded["stage2_transformer"] | {"fps": fps}
    fields = dataclasses.fields(DenoisingSettings)
    settings = DenoisingSettings(**{field.name: made[field.name] for field in fields})
    prompts = recorded["stage1_text_encoder"]["prompt"]
    prompts = [prompts] if isinstance(prompts, str) else prompts
    for video, sampler, prompt in zip(videos, samplers, prompts, strict=True):
        sheet = contact_sheet(video)
        caption = f"{prompt}\n{settings.describe()}"
        write_contact_sheet(
            sheet, sampler.frames(), indices=sampler.indices, fps=fps, caption=caption
        )


if __name__ == "__main__":
    utils.run_main(lambda: run(parse_arguments(), "vae_torchax"))
