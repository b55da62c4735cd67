"""Writing of videos: frames to `.mp4`, `.gif`, `.webp`, `.npy`, or a folder of PNG images.

Frames are written batch by batch as the decoder yields them, so host memory holds one batch
(ffmpeg itself collects all frames of a `.gif`, because its palette depends on all of them).
numpy, Pillow and ffmpeg are imported when the first frames arrive.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cogvideox.video.encoders import Encoder, FfmpegEncoder, NpyEncoder, PngEncoder
from cogvideox.video.formats import DEFAULT_QUALITY, check_output_path, wants_float
from cogvideox.video.frame_folder import atomic_frame_folder
from cogvideox.video.pixels import check_range, to_uint8
from runtime.files import atomic_path, reporting_disk_errors

if TYPE_CHECKING:
    import numpy as np

# Prompts of 20,000 characters make 0.2 MB.
_MAX_COMMENT_BYTES = 1 << 20


@contextmanager
def open_video_writer(
    path: Path,
    *,
    fps: int,
    num_frames: int,
    quality: int | None = None,
    comment: str | None = None,
) -> Iterator[VideoWriter]:
    """Opens a video for writing; `path` appears when all frames are written.

    An exception inside the block, or too few frames, leaves `path` as it was and no temporary
    file. A killed process leaves a hidden temporary file, which the next write of `path` removes.

    Args:
        path: the output; its suffix selects the format. Missing parent folders are made.
        fps: frames a second. `.npy` and PNG folders do not store it.
        num_frames: F, the number of frames of the video; fewer or more is an error.
        quality: 0 (small) to 10 (best) for `.mp4` and `.webp`; None is `DEFAULT_QUALITY`.
        comment: text for the comment tag of an `.mp4`; None writes no tag. Other formats store no
            comment.

    Raises:
        ValueError: see `check_output_path` and `VideoWriter.write`.
        TypeError: the format does not take the dtype of the frames.
        OSError: the disk refuses, or ffmpeg fails; the message holds ffmpeg's output.
    """
    check_output_path(path, fps=fps, quality=quality)
    with (
        atomic_video(path) as temporary,
        encode_video(
            temporary, path, fps=fps, num_frames=num_frames, quality=quality, comment=comment
        ) as writer,
    ):
        yield writer


def atomic_video(path: Path) -> AbstractContextManager[Path]:
    """The temporary file or folder of a video, which replaces `path` when the block ends."""
    target = path.resolve()  # follow a link instead of replacing it
    return atomic_path(target) if path.suffix else atomic_frame_folder(target)


@contextmanager
def encode_video(
    temporary: Path,
    path: Path,
    *,
    fps: int,
    num_frames: int,
    quality: int | None = None,
    comment: str | None = None,
) -> Iterator[VideoWriter]:
    """Opens a video for writing to `temporary`, of `atomic_video`; whole when the block ends.

    The other arguments and the errors are those of `open_video_writer`, but for `path`, which the
    caller has checked before the work.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    if comment is not None and len(comment.encode(errors="replace")) > _MAX_COMMENT_BYTES:
        raise ValueError(f"the comment of a video is limited to {_MAX_COMMENT_BYTES} bytes")
    with reporting_disk_errors(path):
        yield from _encode(temporary, path, fps, num_frames, quality, comment)


def _encode(
    temporary: Path,
    path: Path,
    fps: int,
    num_frames: int,
    quality: int | None,
    comment: str | None,
) -> Iterator[VideoWriter]:
    suffix = path.suffix.lower()
    if suffix == "":
        encoder: Encoder = PngEncoder(temporary)
    elif suffix == ".npy":
        encoder = NpyEncoder(temporary, num_frames)
    else:
        quality = DEFAULT_QUALITY if quality is None else quality
        encoder = FfmpegEncoder(temporary, suffix, fps, quality, comment)
    try:
        writer = VideoWriter(path, num_frames, encoder)
        yield writer
        if writer.frames_written != num_frames:
            raise ValueError(
                f"{path.name}: only {writer.frames_written} of {num_frames} frames were written"
            )
        encoder.finish()
    finally:
        encoder.release()


class VideoWriter:
    """Takes the frames of one video in order, batch by batch; see `open_video_writer`."""

    def __init__(self, path: Path, num_frames: int, encoder: Encoder) -> None:
        self.frames_written = 0
        self._path = path
        self._num_frames = num_frames
        self._encoder = encoder
        self._size: tuple[int, int] | None = None

    def write(self, frames: np.ndarray) -> None:
        """Appends frames [f, height, width, 3], uint8 or float32 in 0..1.

        `.npy` takes float32 only, because it promises exact values. `.mp4` needs an even height and
        width, because yuv420p stores one colour for two by two pixels.

        Args:
            frames: the next frames; f may be 0.

        Raises:
            ValueError: the shape does not fit, there are too many frames, or a value is not in
                0..1.
            TypeError: the format does not take the dtype.
        """
        if frames.ndim != 4 or frames.shape[-1] != 3:
            raise ValueError(f"frames must be [f, height, width, 3], got {list(frames.shape)}")
        if len(frames) == 0:
            return
        if self.frames_written + len(frames) > self._num_frames:
            raise ValueError(f"{self._path.name}: more than {self._num_frames} frames were written")
        if frames.dtype.name not in ("uint8", "float32"):
            raise TypeError(f"frames must be uint8 or float32, got {frames.dtype}")
        height, width = frames.shape[1:3]
        if self._size is None:
            self._encoder.start(height, width)
            self._size = (height, width)
        elif self._size != (height, width):
            before = "x".join(map(str, self._size))
            raise ValueError(f"frames of {height}x{width} follow frames of {before}")
        if wants_float(self._path):
            if frames.dtype.name != "float32":
                raise TypeError(".npy takes float32 frames, got uint8")
            check_range(frames)
        elif frames.dtype.name == "float32":
            frames = to_uint8(frames)
        self._encoder.append(frames)
        self.frames_written += len(frames)
