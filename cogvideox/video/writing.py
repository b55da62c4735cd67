"""Frames to files: `.mp4`, `.gif`, `.webp`, `.npy`, or a folder of PNG images.

The suffix of the path picks the format. Frames are written batch by batch as the decoder hands
them over, so host memory holds one batch (ffmpeg itself collects the frames of a `.gif`, whose
palette depends on all of them). Importing this module costs nothing: numpy, Pillow and ffmpeg are
loaded when the first frames arrive, so the path can be checked before anything heavy starts.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cogvideox.video.frame_folder import atomic_frame_folder, foreign_entries, frame_name
from runtime.files import atomic_path

if TYPE_CHECKING:
    import numpy as np

FILE_SUFFIXES = (".mp4", ".gif", ".webp", ".npy")
QUALITY_SUFFIXES = (".mp4", ".webp")
DEFAULT_QUALITY = 7
# Linux takes at most 128 KiB for one command-line argument, and the comment is one.
_MAX_COMMENT_BYTES = 100_000
# 255 is the limit of most file systems; the temporary name adds a process id and five more.
_MAX_NAME_BYTES = 240


def wants_float(path: Path) -> bool:
    """Whether this output takes float32 frames in 0..1 (`.npy`) rather than uint8 frames."""
    return path.suffix.lower() == ".npy"


def check_output_path(path: Path, *, fps: int | None = None, quality: int | None = None) -> None:
    """Raise ValueError, in one line, if a video cannot be written to `path` with these settings.

    Changes nothing on the disk: missing parent folders are made when writing starts. `fps` and
    `quality` (0..10, None for the default) are checked against the format where they are given.
    """
    problem = _path_problem(path)
    if problem is not None:
        raise ValueError(f"--output_video {str(path)!r}: {problem}")
    problem = _settings_problem(path.suffix.lower(), fps, quality)
    if problem is not None:
        raise ValueError(problem)


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """float32 [..., channels] in 0..1 to uint8: round(255 x), as diffusers makes its images.

    Raises ValueError for values outside 0..1 or not finite, which a cast would wrap silently.
    """
    _check_range(frames)
    return (frames * 255).round().astype("uint8")


@contextmanager
def open_video_writer(
    path: Path,
    *,
    fps: int,
    num_frames: int,
    quality: int | None = None,
    comment: str | None = None,
) -> Iterator[VideoWriter]:
    """Context manager: write batches of frames, and `path` appears when all of them are there.

    Args:
        path: the output; its suffix picks the format. Missing parent folders are made.
        fps: frames a second. `.npy` and PNG folders have no place for it.
        num_frames: F, how many frames will come in all; fewer or more is an error.
        quality: 0 (small) to 10 (best) for `.mp4` and `.webp`; None is `DEFAULT_QUALITY`.
        comment: text for the comment tag of an `.mp4`; None writes no tag. Other formats have no
            such tag and carry none.

    An exception inside the block, or too few frames, leaves whatever was at `path` before and no
    temporary. A killed process leaves a hidden temporary that the next run to `path` removes.

    Raises:
        ValueError: what `check_output_path` finds, or a frame that does not fit (`VideoWriter`).
        TypeError: frames of another dtype than the format takes.
        OSError: the disk refuses, or ffmpeg fails; the message carries what ffmpeg said.
    """
    check_output_path(path, fps=fps, quality=quality)
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    if comment is not None and len(comment.encode(errors="replace")) > _MAX_COMMENT_BYTES:
        raise ValueError(f"the comment of a video is limited to {_MAX_COMMENT_BYTES} bytes")
    suffix = path.suffix.lower()
    target = path.resolve()  # a link is followed, not replaced
    with atomic_path(target) if suffix else atomic_frame_folder(target) as temporary:
        if suffix == "":
            encoder: _Encoder = _PngEncoder(temporary)
        elif suffix == ".npy":
            encoder = _NpyEncoder(temporary, num_frames)
        else:
            quality = DEFAULT_QUALITY if quality is None else quality
            encoder = _FfmpegEncoder(temporary, suffix, fps, quality, comment)
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


def read_comment(path: Path) -> str | None:
    """The comment tag of a video, None if it has none.

    Raises:
        ValueError: ffmpeg cannot read the file.
    """
    from imageio_ffmpeg import get_ffmpeg_exe

    command = [get_ffmpeg_exe(), "-v", "error", "-i", f"file:{path}", "-f", "ffmetadata", "-"]
    ffmpeg = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    if ffmpeg.returncode != 0:
        raise ValueError(f"ffmpeg cannot read {path}: {ffmpeg.stderr.decode(errors='replace')}")
    metadata = ffmpeg.stdout.decode(errors="replace")
    found = re.search(r"^comment=((?:[^\\\n]|\\.)*)$", metadata, re.DOTALL | re.MULTILINE)
    return re.sub(r"\\(.)", r"\1", found[1], flags=re.DOTALL) if found else None


class VideoWriter:
    """Takes the frames of one video in order, batch by batch; made by `open_video_writer`."""

    def __init__(self, path: Path, num_frames: int, encoder: _Encoder) -> None:
        self.frames_written = 0
        self._path = path
        self._num_frames = num_frames
        self._encoder = encoder
        self._size: tuple[int, int] | None = None

    def write(self, frames: np.ndarray) -> None:
        """Append frames [f, height, width, 3], uint8 or float32 in 0..1; any f, also 0.

        `.npy` takes float32 only, because uint8 has lost what it promises to keep. `.mp4` needs an
        even height and width (yuv420p stores one colour for two by two pixels).
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
                raise TypeError(".npy holds exact float32 frames, got uint8")
            _check_range(frames)
        elif frames.dtype.name == "float32":
            frames = to_uint8(frames)
        self._encoder.append(frames)
        self.frames_written += len(frames)


class _Encoder(Protocol):
    """One file format. `start` and `append` and `finish` in this order; `release` always."""

    def start(self, height: int, width: int) -> None: ...
    def append(self, frames: np.ndarray) -> None: ...
    def finish(self) -> None: ...
    def release(self) -> None: ...


class _PngEncoder:
    """One PNG image a frame in an existing folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def start(self, height: int, width: int) -> None:
        pass

    def append(self, frames: np.ndarray) -> None:
        from PIL import Image

        for frame in frames:
            Image.fromarray(frame).save(self._folder / frame_name(self._count))
            self._count += 1

    def finish(self) -> None:
        pass

    def release(self) -> None:
        pass


class _NpyEncoder:
    """float32 [F, height, width, 3]: the header first, then the frames as they come.

    Plain writes, no memory map: a full disk is then an OSError instead of a bus error.
    """

    def __init__(self, path: Path, num_frames: int) -> None:
        self._num_frames = num_frames
        self._file = open(path, "wb")

    def start(self, height: int, width: int) -> None:
        import numpy as np

        shape = (self._num_frames, height, width, 3)
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, frames: np.ndarray) -> None:
        import numpy as np

        self._file.write(np.ascontiguousarray(frames, dtype="<f4").data)

    def finish(self) -> None:
        self._file.flush()

    def release(self) -> None:
        self._file.close()


class _FfmpegEncoder:
    """ffmpeg as a child process that reads raw RGB frames from a pipe.

    The binary is imageio-ffmpeg's. Its own `write_frames` is not used for two reasons: it never
    looks at ffmpeg's exit status, so a full disk would pass a truncated file off as a video; and
    it starts ffmpeg with `preexec_fn`, which forks a process in which JAX runs threads.
    """

    def __init__(
        self, path: Path, suffix: str, fps: int, quality: int, comment: str | None
    ) -> None:
        self._path = path
        self._suffix = suffix
        self._fps = fps
        self._quality = quality
        self._comment = comment
        self._process: subprocess.Popen[bytes] | None = None
        # A file, not a pipe: nobody reads while frames are written, and a full pipe would block.
        self._messages = tempfile.TemporaryFile()

    def start(self, height: int, width: int) -> None:
        from imageio_ffmpeg import get_ffmpeg_exe

        if self._suffix == ".mp4" and (height % 2 or width % 2):
            raise ValueError(f".mp4 needs an even height and width, got {height}x{width}")
        source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
        source += ["-r", str(self._fps), "-i", "pipe:0"]
        command = [get_ffmpeg_exe(), "-y", "-v", "error", *source, *self._output_arguments()]
        self._process = subprocess.Popen(
            [*command, str(self._path)],  # an absolute path, so not mistaken for an option or URL
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._messages,
        )

    def _output_arguments(self) -> list[str]:
        if self._suffix == ".gif":
            # One palette for the whole video: a palette a frame makes still areas flicker.
            graph = "split[all][again];[all]palettegen[palette];[again][palette]paletteuse"
            return ["-filter_complex", graph, "-loop", "0", "-f", "gif"]
        if self._suffix == ".webp":
            encoding = ["-c:v", "libwebp_anim", "-quality", str(10 * self._quality)]
            return [*encoding, "-loop", "0", "-f", "webp"]
        # imageio's scale from 0..10 to x264's 51..0, but for 0 itself: lossless H.264 is a profile
        # that browsers and QuickTime do not play.
        crf = max(1, round(51 * (1 - self._quality / 10)))
        # Players take HD video for BT.709. ffmpeg converts by BT.601 unless told, which shifts
        # greens and reds; so convert by BT.709 and say so in the file.
        convert = "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd"
        say = "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
        encoding = ["-vf", f"{convert},{say}", "-c:v", "libx264", "-pix_fmt", "yuv420p"]
        encoding += ["-crf", str(crf)]
        tag = [] if self._comment is None else ["-metadata", f"comment={self._comment}"]
        # The index before the frames, so that a browser can start before it has the whole file.
        return [*encoding, *tag, "-movflags", "+faststart", "-f", "mp4"]

    def append(self, frames: np.ndarray) -> None:
        import numpy as np

        try:
            self._process.stdin.write(np.ascontiguousarray(frames).data)
        except BrokenPipeError:
            self._process.wait()
            raise OSError(self._failure()) from None

    def finish(self) -> None:
        try:
            self._process.stdin.close()  # flushes what is buffered, then tells ffmpeg to finish
        except BrokenPipeError:
            self._process.wait()
            raise OSError(self._failure()) from None
        if self._process.wait() != 0:
            raise OSError(self._failure())

    def _failure(self) -> str:
        self._messages.seek(0)
        said = self._messages.read().decode(errors="replace").strip() or "nothing"
        return f"ffmpeg ended with status {self._process.returncode} and said: {said}"

    def release(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self._process is not None and not self._process.stdin.closed:
            # Frames still buffered for a process that is gone; the error that brought us here,
            # not this one, is what the user should see.
            with suppress(BrokenPipeError):
                self._process.stdin.close()
        self._messages.close()


def _check_range(frames: np.ndarray) -> None:
    if frames.size == 0:
        return
    low, high = frames.min(), frames.max()
    if not (low >= 0 and high <= 1):  # written so that NaN fails too
        raise ValueError(f"float frames must be within 0..1, got values from {low} to {high}")


def _settings_problem(suffix: str, fps: int | None, quality: int | None) -> str | None:
    if fps is not None and fps < 1:
        return f"--fps {fps}: must be at least 1"
    if fps is not None and fps > 50 and suffix == ".gif":
        return f"--fps {fps}: GIF players show at most 50 frames a second"
    if quality is not None and suffix not in QUALITY_SUFFIXES:
        return f"--quality {quality}: only {' and '.join(QUALITY_SUFFIXES)} have a quality"
    if quality is not None and not 0 <= quality <= 10:
        return f"--quality {quality}: must be from 0 to 10"
    return None


def _path_problem(path: Path) -> str | None:
    choices = f"use one of {', '.join(FILE_SUFFIXES)}, or no suffix for a folder of PNG frames"
    if path.name in ("", ".."):
        return "it has no name of its own; name a file or a new folder"
    if path.name.lower() in FILE_SUFFIXES:
        return "it has a suffix but no name before it"
    if path.suffix and path.suffix.lower() not in FILE_SUFFIXES:
        return f"unknown suffix {path.suffix!r}; {choices}"
    excess = max(len(os.fsencode(part)) for part in path.parts) - _MAX_NAME_BYTES
    if excess > 0:
        return f"a name in it is too long by {excess} bytes"
    target = path.resolve()
    if path.suffix and target.exists() and not target.is_file():
        return f"a {path.suffix} file is wanted, but a folder or device has this name"
    if not path.suffix and target.exists():
        if not target.is_dir():
            return f"a folder for PNG frames is wanted, but a file has this name; {choices}"
        foreign = foreign_entries(target)
        if foreign:
            return f"the folder holds other things than our frames (such as {foreign[0]!r})"
    existing = target.parent
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        return f"{str(existing)!r} is not a folder"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"the folder {str(existing)!r} is not writable"
    return None
