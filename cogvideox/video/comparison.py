"""Compares two videos frame by frame: PSNR, SSIM, VMAF, LPIPS, and pictures of the difference.

Frames are streamed, so host memory holds a few frames, not the videos.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np

from cogvideox.video.formats import check_output_path
from cogvideox.video.frames import Video, read_frames
from cogvideox.video.metrics import SSIM_MIN_SIZE, mean_squared_error, psnr, ssim, to_float
from cogvideox.video.pixels import to_uint8
from cogvideox.video.vmaf import VMAF_MIN_SIZE, VmafMeter, has_vmaf
from cogvideox.video.writing import open_video_writer
from runtime.files import atomic_path
from runtime.progress import progress

# Frame rate of a side-by-side video if neither video stores one; CogVideoX1.5's own.
_DEFAULT_FPS = 16


@dataclasses.dataclass(frozen=True)
class Pictures:
    """What to draw beside the figures.

    Attributes:
        side_by_side: a video of A, B and their difference; None draws none.
        difference: a PNG of the same for the worst frame; None draws none.
        amplify: factor on the absolute difference, which is clipped at white.
    """

    side_by_side: Path | None = None
    difference: Path | None = None
    amplify: int = 8

    def triple(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Returns A, B and the amplified difference side by side, uint8 [H, 3 W, 3]."""
        difference = np.clip(self.amplify * np.abs(a - b), 0, 1)
        return to_uint8(np.concatenate([a, b, difference], axis=1).astype(np.float32))


_NO_PICTURES = Pictures()


@dataclasses.dataclass(frozen=True)
class Scores:
    """One metric of all frames.

    Attributes:
        frames: the metric of each frame.
        mean: over the frames; infinite if one is.
        worst_frame: number of the frame with the worst value, the first of equal ones.
    """

    frames: list[float]
    mean: float
    worst_frame: int

    @classmethod
    def of(cls, frames: list[float], *, higher_is_better: bool = True) -> Scores:
        worst = min(frames) if higher_is_better else max(frames)
        return cls(frames, sum(frames) / len(frames), frames.index(worst))


@dataclasses.dataclass(frozen=True)
class VideoScores:
    """How far video B is from video A.

    Attributes:
        identical: every value of every frame is equal.
        psnr: in dB with peak 1, infinite for equal frames.
        psnr_of_all_pixels: in dB, of the mean squared error over the whole video.
        ssim: see `cogvideox.video.metrics.ssim`.
        vmaf: None if not measured; `notes` says why.
        lpips: None without weights.
    """

    identical: bool
    psnr: Scores
    psnr_of_all_pixels: float
    ssim: Scores
    vmaf: Scores | None
    lpips: Scores | None
    notes: list[str]


def check_comparable(a: Video, b: Video) -> None:
    """Checks that two videos agree in size, frame count and frame rate.

    A rate that is not stored is not compared, and the rounding of GIF's and WebP's clocks is
    allowed for.

    Raises:
        ValueError: they cannot be compared, in one line that names both values.
    """

    def refuse(what: str, of_a: object, of_b: object) -> None:
        raise ValueError(f"cannot compare: {a.path} {what} {of_a}, {b.path} {of_b}")

    if (a.height, a.width) != (b.height, b.width):
        refuse("is", f"{a.height}x{a.width}", f"{b.height}x{b.width}")
    if a.num_frames != b.num_frames:
        refuse("has", f"{a.num_frames} frames", f"{b.num_frames}")
    if a.fps is not None and b.fps is not None:
        seconds = (a.num_frames / a.fps, b.num_frames / b.fps)
        clock = 1.5 * max(a.clock, b.clock)
        if not math.isclose(*seconds, rel_tol=1e-3, abs_tol=clock):
            refuse("has", f"{a.fps:.5g} frames a second", f"{b.fps:.5g}")
    if min(a.height, a.width) < SSIM_MIN_SIZE:
        size = f"{a.height}x{a.width}, at least {SSIM_MIN_SIZE}x{SSIM_MIN_SIZE} is needed"
        raise ValueError(f"cannot compare: {a.path} is {size}")


def check_pictures(pictures: Pictures, video: Video) -> None:
    """Checks that the pictures can be written for videos of this size.

    Raises:
        ValueError: naming the option.
    """
    path = pictures.difference
    if path is not None and path.suffix.lower() != ".png":
        raise ValueError(f"--difference {path}: the picture is a .png")
    path = pictures.side_by_side
    if path is None:
        return
    if path.suffix.lower() not in (".mp4", ".gif", ".webp"):
        raise ValueError(f"--side_by_side {path}: use .mp4, .gif or .webp")
    if path.suffix.lower() == ".mp4" and (video.height % 2 or video.width % 2):
        raise ValueError(
            f"--side_by_side {path}: .mp4 needs an even height and width, not "
            f"{video.height}x{video.width}; use .gif or .webp"
        )
    check_output_path(path, fps=_whole_fps(video), option="--side_by_side")


def compare_videos(
    a: Video,
    b: Video,
    *,
    lpips: Callable[[np.ndarray, np.ndarray], float] | None = None,
    pictures: Pictures = _NO_PICTURES,
) -> VideoScores:
    """Measures how far B is from A, the reference, with a progress bar on stderr.

    Args:
        a, b: see `cogvideox.video.frames.inspect_video`.
        lpips: see `cogvideox.video.lpips.Lpips`; None leaves LPIPS out.
        pictures: what to draw.

    Raises:
        ValueError: they cannot be compared, or one is damaged. No picture is written then.
        RunError: ffmpeg fails to measure VMAF.
        OSError: the disk refuses a picture.
    """
    check_comparable(a, b)
    check_pictures(pictures, a)
    note = _no_vmaf(a)
    figures = _Figures(lpips)
    with ExitStack() as stack:
        meter = None if note else stack.enter_context(VmafMeter(a.height, a.width))
        writer = None
        if pictures.side_by_side is not None:
            fps, frames = _whole_fps(a, b), a.num_frames
            opened = open_video_writer(pictures.side_by_side, fps=fps, num_frames=frames)
            writer = stack.enter_context(opened)
        frames_a, frames_b = (stack.enter_context(closing(read_frames(v))) for v in (a, b))
        pairs = zip(frames_a, frames_b, strict=True)
        bar = progress(pairs, total=a.num_frames, what="comparing", unit="frame")
        with bar:
            for stored_a, stored_b in bar:
                of_a, of_b = to_float(stored_a), to_float(stored_b)
                figures.add(of_a, of_b)
                if meter is not None:
                    meter.add(_as_uint8(stored_a), _as_uint8(stored_b))
                if writer is not None:
                    writer.write(pictures.triple(of_a, of_b)[None])
        vmaf = None if meter is None else Scores.of(meter.finish())
    if pictures.difference is not None:
        _save_png(pictures.difference, pictures.triple(*figures.worst))
    return figures.scores(vmaf, note)


class _Figures:
    """Collects the metrics of each pair of frames, and keeps the worst pair by PSNR."""

    def __init__(self, lpips: Callable[[np.ndarray, np.ndarray], float] | None) -> None:
        self._distance = lpips
        self._errors: list[float] = []
        self._ssim: list[float] = []
        self._lpips: list[float] = []
        self.worst: tuple[np.ndarray, np.ndarray]

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        """Takes the next pair of float64 frames [height, width, 3] in 0..1."""
        error = mean_squared_error(a, b)
        if not self._errors or error > max(self._errors):
            self.worst = (a, b)
        self._errors.append(error)
        self._ssim.append(ssim(a, b))
        if self._distance is not None:
            self._lpips.append(0.0 if error == 0 else self._distance(a, b))

    def scores(self, vmaf: Scores | None, note: str | None) -> VideoScores:
        return VideoScores(
            identical=not any(self._errors),
            psnr=Scores.of([psnr(error) for error in self._errors]),
            psnr_of_all_pixels=psnr(sum(self._errors) / len(self._errors)),
            ssim=Scores.of(self._ssim),
            vmaf=vmaf,
            lpips=Scores.of(self._lpips, higher_is_better=False) if self._lpips else None,
            notes=[note] if note else [],
        )


def _whole_fps(*videos: Video) -> int:
    """The frame rate of the first video that stores one, as the whole number an encoder takes."""
    stored = [video.fps for video in videos if video.fps is not None]
    return max(1, round(stored[0])) if stored else _DEFAULT_FPS


def _no_vmaf(video: Video) -> str | None:
    """Why VMAF cannot be measured; None if it can."""
    if min(video.height, video.width) < VMAF_MIN_SIZE:
        return f"VMAF not measured: it needs frames of at least {VMAF_MIN_SIZE}x{VMAF_MIN_SIZE}"
    return None if has_vmaf() else "VMAF not measured: the installed ffmpeg has no libvmaf"


def _as_uint8(frame: np.ndarray) -> np.ndarray:
    return frame if frame.dtype == np.uint8 else to_uint8(frame)


def _save_png(path: Path, picture: np.ndarray) -> None:
    from PIL import Image

    with atomic_path(path.resolve()) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG")
