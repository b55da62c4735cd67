"""Encoders: one class a file format, each fed with batches of frames in order."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

from cogvideox.video.frame_folder import frame_name
from runtime.files import WRITE_ERRORS

if TYPE_CHECKING:
    import numpy as np


class Encoder(Protocol):
    """One file format.

    Call `start` once, `append` for each batch, `finish` once, in this order. Call `release` always,
    also after an error.
    """

    def start(self, height: int, width: int) -> None:
        """Prepares the output for frames of this size."""
        ...

    def append(self, frames: np.ndarray) -> None:
        """Encodes frames [F, height, width, 3]: float32 for `.npy`, else uint8."""
        ...

    def finish(self) -> None:
        """Completes the output."""
        ...

    def release(self) -> None:
        """Closes files and ends child processes."""
        ...


class PngEncoder:
    """Writes one PNG image a frame into an existing folder."""

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


class NpyEncoder:
    """Writes float32 [F, height, width, 3]: the header first, then the frames as they come.

    Plain writes instead of a memory map turn a full disk into an OSError instead of a bus error.
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


class FfmpegEncoder:
    """Runs ffmpeg as a child process that reads raw frames from a pipe, by planes of a colour.

    The decoder makes planes; interleaving them would take 0.7 s for 81 frames of 768x1360.

    The binary comes from imageio-ffmpeg. Its `write_frames` is not used, because it ignores
    ffmpeg's exit status (a full disk would leave a truncated video) and starts ffmpeg with
    `preexec_fn`, which is unsafe in a process with threads such as JAX's.
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
        # A file, because nobody reads stderr while frames are written, and a full pipe would block.
        self._messages = tempfile.TemporaryFile()
        self._tag = tempfile.TemporaryFile()

    def start(self, height: int, width: int) -> None:
        from imageio_ffmpeg import get_ffmpeg_exe

        if self._suffix == ".mp4" and (height % 2 or width % 2):
            raise ValueError(f".mp4 needs an even height and width, got {height}x{width}")
        source = ["-f", "rawvideo", "-pix_fmt", "gbrp", "-s", f"{width}x{height}"]
        source += ["-r", str(self._fps), "-i", "pipe:0"]
        tag = []
        if self._comment is not None:
            # A file, because Linux takes at most 128 KiB for one command-line argument.
            self._tag.write(f";FFMETADATA1\ncomment={_escaped(self._comment)}\n".encode())
            self._tag.flush()
            tag = [self._tag.fileno()]
            source += ["-f", "ffmetadata", "-i", f"/dev/fd/{tag[0]}", "-map_metadata", "1"]
        command = [get_ffmpeg_exe(), "-y", "-v", "error", *source, *self._output_arguments()]
        self._process = subprocess.Popen(
            [*command, str(self._path)],  # an absolute path is never taken for an option or URL
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._messages,
            pass_fds=tag,
        )

    def _output_arguments(self) -> list[str]:
        if self._suffix == ".gif":
            # One palette for the whole video: with a palette a frame, still areas flicker.
            graph = "split[all][again];[all]palettegen[palette];[again][palette]paletteuse"
            return ["-filter_complex", graph, "-loop", "0", "-f", "gif"]
        if self._suffix == ".webp":
            encoding = ["-c:v", "libwebp_anim", "-quality", str(10 * self._quality)]
            return [*encoding, "-loop", "0", "-f", "webp"]
        # imageio's scale from 0..10 to x264's 51..0. It stops at 1, because 0 selects lossless
        # H.264, a profile that browsers and QuickTime do not play.
        crf = max(1, round(51 * (1 - self._quality / 10)))
        # Players decode HD video by BT.709, while ffmpeg converts by BT.601 unless told otherwise,
        # which shifts greens and reds. Convert by BT.709 and say so in the file.
        convert = "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd"
        say = "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
        encoding = ["-vf", f"{convert},{say}", "-c:v", "libx264", "-pix_fmt", "yuv420p"]
        encoding += ["-crf", str(crf)]
        # The index goes before the frames, so that a browser can play while it downloads.
        return [*encoding, "-movflags", "+faststart", "-f", "mp4"]

    def append(self, frames: np.ndarray) -> None:
        import numpy as np

        process, pipe = self._running()
        try:
            for frame in frames:
                for colour in (1, 2, 0):  # green, blue, red
                    pipe.write(np.ascontiguousarray(frame[..., colour]).data)
        except BrokenPipeError:
            process.wait()
            raise self._failure(process) from None

    def finish(self) -> None:
        process, pipe = self._running()
        try:
            pipe.close()  # flushes, then tells ffmpeg to finish
        except BrokenPipeError:
            process.wait()
            raise self._failure(process) from None
        if process.wait() != 0:
            raise self._failure(process)

    def release(self) -> None:
        if self._process is not None:
            process, pipe = self._running()
            if process.poll() is None:
                process.kill()
                process.wait()
            if not pipe.closed:
                # Closing flushes frames to a process that is gone. The error that led here is the
                # one to report.
                with suppress(BrokenPipeError):
                    pipe.close()
        self._messages.close()
        self._tag.close()

    def _running(self) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
        if self._process is None or self._process.stdin is None:
            raise RuntimeError("start() must be called first")
        return self._process, self._process.stdin

    def _failure(self, process: subprocess.Popen[bytes]) -> OSError:
        self._messages.seek(0)
        said = self._messages.read().decode(errors="replace").strip() or "nothing"
        for number in WRITE_ERRORS:
            if os.strerror(number) in said:
                return OSError(number, os.strerror(number))
        return OSError(f"ffmpeg ended with status {process.returncode} and said: {said}")


def _escaped(text: str) -> str:
    """A value of ffmpeg's metadata files."""
    return re.sub(r"([=;#\\\n])", r"\\\1", text)
