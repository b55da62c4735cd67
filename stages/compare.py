"""Compares two results: videos, latents files, or output folders with both.

`check` resolves what the paths hold and refuses what cannot be compared before any frame is
decoded; `run` measures. Light on purpose: numpy and ffmpeg are used only in the functions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors

from cogvideox.video.formats import FILE_SUFFIXES
from runtime.errors import RunError, checking_input
from stages import files

if TYPE_CHECKING:
    from cogvideox.video.comparison import Pictures, Scores, VideoScores
    from cogvideox.video.frames import Video

_DECODE = "stage3_vae_decoder"


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """Settings of a comparison.

    Attributes:
        a: the reference: a video, a latents file or an output folder.
        b: what is measured against it.
        side_by_side, difference, amplify: see `cogvideox.video.comparison.Pictures`.
        lpips_weights: see `cogvideox.video.lpips`; None leaves LPIPS out.
    """

    a: Path
    b: Path
    side_by_side: Path | None = None
    difference: Path | None = None
    amplify: int = 8
    lpips_weights: Path | None = None


@dataclasses.dataclass(frozen=True)
class Held:
    """What a path holds.

    Attributes:
        videos: paths of its videos in order.
        latents: its latents file, if any.
    """

    videos: list[Path]
    latents: Path | None


@dataclasses.dataclass(frozen=True)
class Checked:
    """Pairs that can be compared, A first, and what only one side holds."""

    videos: list[tuple[Video, Video]]
    pictures: list[Pictures]
    latents: tuple[Path, Path] | None
    notes: list[str]


@dataclasses.dataclass(frozen=True)
class LatentsScores:
    """How far latents B are from latents A.

    Attributes:
        shape: [batch, channels, latent_frames, latent_height, latent_width].
        peak: the largest minus the smallest value of A, the peak of the PSNR.
        psnr: in dB of each latent frame, over the batch.
        psnr_of_all_values: in dB, of the mean squared error over the file.
        relative_l2: norm of A - B over the norm of A.
    """

    identical: bool
    shape: tuple[int, ...]
    peak: float
    psnr: Scores
    psnr_of_all_values: float
    relative_l2: float


@dataclasses.dataclass(frozen=True)
class Report:
    """All results of one comparison."""

    videos: list[tuple[Video, Video, VideoScores]]
    latents: tuple[Path, Path, LatentsScores] | None
    notes: list[str]


def run(options: CompareOptions) -> Report:
    """Checks and measures.

    Raises:
        InputError: the two cannot be compared, or one is damaged.
        RunError: ffmpeg or the disk fails.
    """
    with checking_input(), _reporting_failures():
        checked = check(options)
        lpips = None
        if options.lpips_weights is not None:
            from cogvideox.video.lpips import Lpips, load_lpips_weights

            lpips = Lpips(load_lpips_weights(options.lpips_weights))
        latents = None
        if checked.latents is not None:
            latents = (*checked.latents, compare_latents(*checked.latents))
        from cogvideox.video.comparison import compare_videos

        videos = [
            (a, b, compare_videos(a, b, lpips=lpips, pictures=pictures))
            for (a, b), pictures in zip(checked.videos, checked.pictures, strict=True)
        ]
    notes = [note for _, _, scores in videos for note in scores.notes]
    return Report(videos, latents, list(dict.fromkeys([*checked.notes, *notes])))


@contextlib.contextmanager
def _reporting_failures() -> Iterator[None]:
    """Turns a failure to read or write into a RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{error.filename or 'ffmpeg'}: {error.strerror or error}") from error


def check(options: CompareOptions) -> Checked:
    """Checks that the two can be compared and that the pictures can be written.

    Raises:
        ValueError: saying why not, in one line.
    """
    from cogvideox.video.comparison import check_comparable, check_pictures
    from cogvideox.video.frames import inspect_video

    a, b = find_held(options.a), find_held(options.b)
    if bool(a.videos) != bool(b.videos) and bool(a.latents) != bool(b.latents):
        with_video, with_latents = options.a, options.b
        if b.videos:
            with_video, with_latents = with_latents, with_video
        raise ValueError(f"cannot compare: {with_video} is a video, {with_latents} latents")
    notes = []
    for what, of_a, of_b in (("a video", a.videos, b.videos), ("latents", a.latents, b.latents)):
        if bool(of_a) != bool(of_b):
            notes.append(f"only {options.a if of_a else options.b} has {what}; not compared")
    both_videos = bool(a.videos and b.videos)
    if both_videos and len(a.videos) != len(b.videos):
        raise ValueError(
            f"cannot compare: {options.a} has {len(a.videos)} videos, {options.b} {len(b.videos)}"
        )
    latents = (a.latents, b.latents) if a.latents and b.latents else None
    if latents is not None:
        _check_latents(*latents)
    videos = []
    if both_videos:
        for one, other in zip(a.videos, b.videos, strict=True):
            videos.append((inspect_video(one), inspect_video(other)))
            check_comparable(*videos[-1])
    pictures = _pictures(options, len(videos))
    for (one, other), picture in zip(videos, pictures, strict=True):
        check_pictures(picture, one)
        _check_targets(picture, [one.path, other.path])
        _check_lpips(options, one)
    if not videos:
        _refuse_video_options(options)
    return Checked(videos, pictures, latents, notes)


def _pictures(options: CompareOptions, count: int) -> list[Pictures]:
    """What to draw for each pair; several pairs number their files."""
    from cogvideox.video.comparison import Pictures

    def numbered(path: Path | None) -> list[Path] | list[None]:
        return [None] * count if path is None else files.numbered(path, count)

    paths = zip(numbered(options.side_by_side), numbered(options.difference), strict=True)
    return [Pictures(video, picture, options.amplify) for video, picture in paths]


def _check_targets(pictures: Pictures, sources: list[Path]) -> None:
    resolved = [source.resolve() for source in sources]
    targets = {"--side_by_side": pictures.side_by_side, "--difference": pictures.difference}
    for option, path in targets.items():
        if path is None:
            continue
        target = path.resolve()
        if any(target == source or source in target.parents for source in resolved):
            raise ValueError(f"{option} {path} would write into what is compared")
        files.check_output_folder(target.parent, target.name, needed_bytes=1 << 24)


def _check_lpips(options: CompareOptions, video: Video) -> None:
    if options.lpips_weights is None:
        return
    from cogvideox.video.lpips import LPIPS_MIN_SIZE

    if min(video.height, video.width) < LPIPS_MIN_SIZE:
        raise ValueError(
            f"--lpips_weights: LPIPS needs frames of at least {LPIPS_MIN_SIZE}x{LPIPS_MIN_SIZE}, "
            f"{video.path} has {video.height}x{video.width}"
        )


def _refuse_video_options(options: CompareOptions) -> None:
    for name in ("side_by_side", "difference", "lpips_weights"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} {getattr(options, name)}: there are no videos to compare")


def find_held(path: Path) -> Held:
    """Finds the videos and the latents at `path`.

    An output folder holds stage files or `output_video.mp4`; its videos are those that stage 3
    recorded. Any other folder is a folder of PNG frames.

    Raises:
        ValueError: there are none.
    """
    if path.suffix.lower() == ".safetensors":
        if not path.is_file():
            raise ValueError(f"{path} does not exist")
        return Held([], path)
    marks = (files.CONFIG_FILE, files.LATENTS_FILE, files.VIDEO_FILE)
    if not path.is_dir() or not any((path / name).exists() for name in marks):
        return Held([path], None)
    latents = path / files.LATENTS_FILE
    videos = _recorded_videos(path)
    if not videos and not latents.is_file():
        raise ValueError(f"{path} holds neither a video nor {files.LATENTS_FILE}")
    return Held(videos, latents if latents.is_file() else None)


def _recorded_videos(folder: Path) -> list[Path]:
    """The videos in an output folder, by the names that stage 3 recorded."""
    names = [files.VIDEO_FILE]
    if (folder / files.CONFIG_FILE).exists():
        section = files.read_config(folder).get(_DECODE)
        recorded = section.get("output_video") if isinstance(section, dict) else None
        if isinstance(recorded, list) and all(isinstance(name, str) for name in recorded):
            names = [Path(name).name for name in recorded]
    found = [folder / name for name in names]
    return [path for path in found if path.exists() and _is_video_name(path)]


def _is_video_name(path: Path) -> bool:
    return path.suffix.lower() in FILE_SUFFIXES or path.is_dir()


# Latents ----------------------------------------------------------------------------------------


def _check_latents(a: Path, b: Path) -> None:
    headers = [_latents_header(path) for path in (a, b)]
    for what, of_a, of_b in zip(("shape", "VAE scaling"), *headers, strict=True):
        if of_a != of_b:
            raise ValueError(f"cannot compare: {a} has {what} {of_a}, {b} {of_b}")


def _latents_header(path: Path) -> tuple[tuple[int, ...], str]:
    """Returns the shape, and whether the VAE's scaling is applied as its metadata says."""
    try:
        with safetensors.safe_open(path, "np") as handle:
            if "latents" not in handle.keys():  # noqa: SIM118
                raise ValueError(f"{path} holds no tensor 'latents'")
            shape = tuple(handle.get_slice("latents").get_shape())
            scaled = (handle.metadata() or {}).get("vae_scaling_applied", "not recorded")
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error})") from error
    if len(shape) != 5 or 0 in shape:
        raise ValueError(f"{path}: latents have five axes, not shape {list(shape)}")
    return shape, scaled


def compare_latents(a: Path, b: Path) -> LatentsScores:
    """Measures how far the latents of file B are from those of file A, the reference.

    Raises:
        ValueError: values are NaN or infinite.
    """
    import ml_dtypes  # noqa: F401  teaches numpy bfloat16
    import numpy as np
    from safetensors.numpy import load_file

    from cogvideox.video.comparison import Scores
    from cogvideox.video.metrics import psnr

    tensors = []
    for path in (a, b):
        tensors.append(load_file(path)["latents"].astype(np.float64))
        if not np.isfinite(tensors[-1]).all():
            raise ValueError(f"{path} holds NaN or infinite values")
    of_a, of_b = tensors
    peak = float(of_a.max() - of_a.min())
    squares = np.square(of_a - of_b)
    norm = float(np.linalg.norm(of_a))
    error = math.sqrt(float(squares.sum()))
    if (peak == 0 or norm == 0) and error > 0:
        raise ValueError(f"{a} holds one value only; it cannot be the reference")
    return LatentsScores(
        identical=error == 0,
        shape=of_a.shape,
        peak=peak,
        psnr=Scores.of([psnr(float(e), peak) for e in squares.mean(axis=(0, 1, 3, 4))]),
        psnr_of_all_values=psnr(float(squares.mean()), peak),
        relative_l2=error / norm if error else 0.0,
    )
