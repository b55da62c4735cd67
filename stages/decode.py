"""Stage 3: latents to frames, and the frames to a video file with its contact sheet."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from runtime import processes
from runtime.devices import start_jax
from runtime.errors import checking_input
from runtime.files import atomic_path, flush, reporting_disk_errors, to_text
from runtime.progress import Timings, progress, working
from stages import files, sections, speed
from stages.lora import read_choices
from stages.video_digest import with_digests

if TYPE_CHECKING:
    import jax
    import numpy as np

    from cogvideox.model.folder import ModelFolder
    from cogvideox.vae.decode import Decoder
    from cogvideox.video.contact_sheet import FrameSampler
    from runtime.jax_types import Device


@dataclasses.dataclass(frozen=True)
class DecodeOptions:
    """Options of stage 3, by the names of the command line.

    Attributes:
        output_video: None writes output_video.mp4 into `input_dir`.
        model_id: None takes the model that made the latents.
        fps: None takes that of stage 2.
        quality: 0 to 10 for .mp4 and .webp; None takes 7.
        no_metadata: leave the settings out of the mp4.
        dp: devices along dp; the width is split over dp x tp. None takes what fits.
        dtype: "bfloat16" or "float32".
        executables: a folder from compile_ahead.py; missing programs are compiled.
        decoder: "torchax" or "flax".
    """

    input_dir: Path
    dtype: str
    decoder: str
    output_video: Path | None = None
    model_id: str | None = None
    fps: int | None = None
    quality: int | None = None
    no_metadata: bool = False
    dp: int | None = None
    tp: int | None = None
    executables: Path | None = None


def check(
    options: DecodeOptions, model: ModelFolder, latents_shape: tuple[int, ...], fps: int
) -> list[Path]:
    """Checks the VAE's files and the paths of the videos; reads no weights.

    Args:
        latents_shape: [B, C, T, H, W].

    Returns:
        The path of each video of the batch.

    Raises:
        ValueError: an unknown suffix, a path that cannot be written, or weights that do not fit
            the config.
    """
    from cogvideox.vae.weights import stored_weights
    from cogvideox.video.formats import check_output_path, wants_float

    batch, channels, _, height, width = latents_shape
    vae = model.vae
    if channels != vae.latent_channels:
        raise ValueError(
            f"the latents have {channels} channels, the VAE takes {vae.latent_channels}"
        )
    stored_weights(model.path / "vae", vae)
    videos = video_paths(options, batch)
    files.check_output_folder(options.input_dir, files.CONFIG_FILE, needed_bytes=1 << 20)
    values = 3 * height * width * vae.spatial_scale**2 * num_frames(model, latents_shape)
    for video in videos:
        if processes.is_first():
            check_output_path(video, fps=fps, quality=options.quality)
        needed = values * (4 if wants_float(video) else 1)
        sheet = files.contact_sheet(video).name
        files.check_output_folder(video.parent, sheet, needed_bytes=needed)
        if video.exists():
            print(f"will replace {video}")
    return videos


def video_paths(options: DecodeOptions, batch: int) -> list[Path]:
    """The path of each video of a batch."""
    return files.numbered(options.output_video or options.input_dir / files.VIDEO_FILE, batch)


def pixel_dtype(videos: Sequence[Path]) -> Literal["uint8", "float32"]:
    """What the decoder returns: float32 for .npy, uint8 for every other kind of video."""
    from cogvideox.video.formats import wants_float

    return "float32" if wants_float(videos[0]) else "uint8"


def num_frames(model: ModelFolder, latents_shape: tuple[int, ...]) -> int:
    """Frames that the VAE makes of latents [B, C, T, H, W]."""
    from cogvideox.model.settings import decoded_frames

    return decoded_frames(latents_shape[2], model.vae.temporal_compression_ratio)


def make_mesh(options: DecodeOptions, devices: Sequence[Device]) -> jax.sharding.Mesh:
    """Makes the mesh of all `devices`.

    Raises:
        ValueError: dp x tp is not the number of devices.
    """
    from runtime import mesh

    return mesh.make_mesh(mesh.all_devices(options.dp, options.tp, len(devices)), devices)


def make_decoder(options: DecodeOptions, model: ModelFolder, mesh: jax.sharding.Mesh) -> Decoder:
    """Makes the decoder; loads no weights.

    Raises:
        ValueError: the VAE's config cannot be decoded.
    """
    import jax.numpy as jnp

    from cogvideox.vae import decode

    dtype = jnp.dtype(options.dtype)
    return decode.make_decoder(program_name(options.decoder), model.vae, mesh, dtype)


def program_name(decoder: str) -> str:
    """The name of a decoder in programs and in generation_config.json, such as "vae_torchax"."""
    return f"vae_{decoder}"


def run(options: DecodeOptions) -> None:
    """Runs stage 3: checks, loads and compiles at once, decodes, and writes the videos."""
    timings = Timings()
    inputs = [files.CONFIG_FILE, files.LATENTS_FILE]
    options = dataclasses.replace(
        options, input_dir=processes.folder_of_first(options.input_dir, inputs)
    )
    # Reading and comparing 22 MB takes 30 ms, while the devices start.
    with (
        timings.phase("start"),
        working("stage 3: importing JAX, starting the devices"),
        ThreadPoolExecutor(1) as background,
        checking_input(),
    ):
        files.check_executables(options.executables)
        config, latents_file = open_latents(options.input_dir)
        reading = background.submit(files.read_tensors, latents_file)
        shape = latents_file.shapes["latents"]
        fps = options.fps or latents_file.section["fps"]
        model = files.find_same_model(options.model_id, latents_file, sections.DECODE)
        videos = check(options, model, shape, fps)
        start_jax(options.dtype)

        import jax

        mesh = make_mesh(options, jax.devices())
        decoder = make_decoder(options, model, mesh)
        latents = reading.result()["latents"]

    from runtime.compilation import CompilationLog

    compilations = CompilationLog()
    output = pixel_dtype(videos)
    with working("loading the VAE decoder and its programs"), ThreadPoolExecutor(1) as background:
        compiling = background.submit(
            decoder.compile, shape, output=output, executables=options.executables
        )
        with timings.phase("load"):
            decoder.load(model.path / "vae")
        with timings.phase("compile"):  # the part that loading did not hide
            compiling.result()
    print(f"stage 3: {compilations.sentence()}")

    section = decoding_section(options, model, latents_file, videos, mesh)
    frames = num_frames(model, shape)
    waited = Timings()
    with timings.phase("run and save"):
        batches = _time_first(decoder.decode(latents, output=output), waited)
        batches = _show(batches, frames)
        if not processes.is_first():
            collections.deque(batches, maxlen=0)
            return
        write_videos(batches, frames, videos, options, {**config, sections.DECODE: section})
    # The encoder works while the devices decode, so the two add up to more than the phase took.
    timings.at_once["run and save"] = {
        "decoding": round(decoder.decode_seconds, 4),
        "saving": round(timings.seconds["run and save"] - waited.seconds["first frames"], 4),
    }
    for video in videos:
        print(f"video: {video}\ncontact sheet: {files.contact_sheet(video)}")
    timings.report(files.timings_file(videos[0]), compilation=compilations.summary())


def decoding_section(
    options: DecodeOptions,
    model: ModelFolder,
    latents_file: files.StageFile,
    videos: Sequence[Path],
    mesh: jax.sharding.Mesh,
) -> dict[str, Any]:
    """The section of stage 3 in generation_config.json."""
    return sections.make_section(
        {
            **sections.model_settings(model, sections.DECODE),
            "latents": latents_file.section["fingerprint"],
            "output_video": [str(video) for video in videos],
            "fps": options.fps or latents_file.section["fps"],
            "quality": options.quality,
            "dtype": options.dtype,
        },
        mesh=dict(mesh.shape),
        decoder=program_name(options.decoder),
    )


def open_latents(input_dir: Path) -> tuple[dict[str, Any], files.StageFile]:
    """Checks the header of stage 2's file; reads no tensor.

    Returns:
        The config beside the file, and the file.

    Raises:
        InputError: the file cannot be used.
    """
    config = files.read_config(input_dir, sections.ENCODE, sections.DENOISE)
    file = files.open_stage_file(
        input_dir, files.LATENTS_FILE, sections.DENOISE, config, {"latents"}
    )
    files.check_inputs_are_current(file, config, "embeddings", sections.ENCODE)
    return config, file


def _time_first(batches: Iterator[np.ndarray], timings: Timings) -> Iterator[np.ndarray]:
    """Yields the same batches; records how long the first one took."""
    with timings.phase("first frames"):
        first = next(batches)
    yield first
    yield from batches


def _show(batches: Iterable[np.ndarray], num_frames: int) -> Iterator[np.ndarray]:
    """Yields the batches [B, F, height, width, 3] and shows a progress bar of frames."""
    with progress(total=num_frames, what="decoding", unit="frame") as bar:
        for frames in batches:
            yield frames
            bar.update(frames.shape[1])


def write_videos(
    batches: Iterable[np.ndarray],
    num_frames: int,
    videos: Sequence[Path],
    options: DecodeOptions,
    config: dict[str, Any],
) -> None:
    """Writes the videos, their contact sheets and generation_config.json.

    All of them are whole on the disk before the first replaces an old file, and the videos come
    last: a new video never lies beside an old contact sheet or config. The config holds the sha256
    of each video file, so that a kill between two replacements can be seen.

    Args:
        batches: [B, F, height, width, 3], uint8 or float32.
        config: all sections of generation_config.json; goes into the mp4.

    Raises:
        RunError: the disk is full, or the input folder was removed.
    """
    from cogvideox.video.writing import atomic_video

    folder, section = options.input_dir, config[sections.DECODE]
    with contextlib.ExitStack() as stack:  # leaves them in the reverse order
        temporaries = [stack.enter_context(atomic_video(video)) for video in videos]
        config_file = stack.enter_context(atomic_path(folder / files.CONFIG_FILE))
        sheets = [
            stack.enter_context(atomic_path(files.contact_sheet(video).resolve()))
            for video in videos
        ]
        _encode(batches, num_frames, videos, temporaries, sheets, options, config)
        merged = files.merged_config(folder, sections.DECODE, section, inherited=folder)
        merged[sections.DECODE] = with_digests(section, videos, temporaries)
        with reporting_disk_errors(folder / files.CONFIG_FILE):
            config_file.write_text(to_text(merged), "utf-8")
            for temporary in (*temporaries, config_file, *sheets):
                flush(temporary)


def _encode(
    batches: Iterable[np.ndarray],
    num_frames: int,
    videos: Sequence[Path],
    temporaries: Sequence[Path],
    sheets: Sequence[Path],
    options: DecodeOptions,
    config: dict[str, Any],
) -> None:
    """Encodes the frames of each video as they come, and draws the contact sheets.

    The encoders keep most frames of a video until they have seen the last one. The sheets are drawn
    while these are encoded.
    """
    from cogvideox.video.contact_sheet import FrameSampler
    from cogvideox.video.writing import encode_video

    fps = config[sections.DECODE]["fps"]
    comment = None if options.no_metadata else json.dumps(config, ensure_ascii=False)
    samplers = [FrameSampler(num_frames) for _ in videos]
    with ThreadPoolExecutor(1) as drawing, contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(
                encode_video(
                    temporary,
                    video,
                    fps=fps,
                    num_frames=num_frames,
                    quality=options.quality,
                    comment=comment,
                )
            )
            for video, temporary in zip(videos, temporaries, strict=True)
        ]
        for frames in batches:
            for writer, sampler, own in zip(writers, samplers, frames, strict=True):
                writer.write(own)
                sampler.add(own)
        drawn = drawing.submit(_write_contact_sheets, samplers, sheets, config, options.input_dir)
    drawn.result()


def _write_contact_sheets(
    samplers: Sequence[FrameSampler],
    sheets: Sequence[Path],
    config: dict[str, Any],
    input_dir: Path,
) -> None:
    from cogvideox.model.settings import DenoisingSettings
    from cogvideox.video.contact_sheet import write_contact_sheet

    fps = config[sections.DECODE]["fps"]
    made = config[sections.DENOISE] | {"fps": fps}
    fields = dataclasses.fields(DenoisingSettings)
    settings = DenoisingSettings(**{field.name: made.get(field.name) for field in fields})
    lossy = speed.read_lossy(made.get("speed", speed.EXACT))
    loras = [choice.shown for choice in read_choices(made.get("lora"))]
    picture = input_dir / files.INPUT_FILE
    shown = config[sections.ENCODE].get("conditions") and picture.is_file()
    start = picture if shown else None
    for sheet, sampler, prompt in zip(sheets, samplers, files.prompts(config), strict=True):
        caption = f"{prompt}\n{settings.describe()}"
        caption += f"\nLoRA: {', '.join(loras)}" if loras else ""
        caption += f"\n{lossy.describe()}" if lossy.names else ""
        write_contact_sheet(
            sheet,
            sampler.frames(),
            indices=sampler.indices,
            fps=fps,
            caption=caption,
            start=start,
        )
