"""VMAF of two videos by the libvmaf filter of imageio-ffmpeg's binary.

Netflix's model vmaf_v0.6.1, which looks at luma alone and was trained for 1080p on a television:
0 to 100; about 97 to 100 for equal videos, less for tiny ones.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING

from runtime.errors import RunError

if TYPE_CHECKING:
    import numpy as np

_LOG = "vmaf.json"
# libvmaf crashes on frames with a side of 16 or fewer pixels.
VMAF_MIN_SIZE = 17


def has_vmaf() -> bool:
    """Returns whether the installed ffmpeg has libvmaf."""
    from imageio_ffmpeg import get_ffmpeg_exe

    done = subprocess.run([get_ffmpeg_exe(), "-v", "error", "-filters"], capture_output=True)
    return b" libvmaf " in done.stdout


class VmafMeter:
    """Feeds pairs of frames to ffmpeg; a context manager that ends the child process.

    One pipe carries both frames of a pair, one above the other, so no format's time stamps can
    misalign the videos.
    """

    def __init__(self, height: int, width: int) -> None:
        from imageio_ffmpeg import get_ffmpeg_exe

        self._folder = tempfile.TemporaryDirectory(prefix="vmaf_")
        self._messages: IO[bytes] = tempfile.TemporaryFile()
        luma = "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd"
        half = f"crop={width}:{height}:0"
        # The first input of libvmaf is the distorted video, the second the reference.
        graph = (
            f"{luma},format=yuv444p,split[upper][lower];"
            f"[upper]{half}:0[reference];[lower]{half}:{height}[distorted];"
            f"[distorted][reference]libvmaf=log_fmt=json:log_path={_LOG}:n_threads=2"
        )
        source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{2 * height}"]
        self._process = subprocess.Popen(
            [get_ffmpeg_exe(), "-v", "error", *source, "-i", "pipe:0", "-filter_complex", graph]
            + ["-f", "null", "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._messages,
            cwd=self._folder.name,
        )

    def __enter__(self) -> VmafMeter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._messages.close()
        self._folder.cleanup()

    def add(self, reference: np.ndarray, distorted: np.ndarray) -> None:
        """Takes the next pair of uint8 frames [height, width, 3].

        Raises:
            RunError: ffmpeg ended.
        """
        import numpy as np

        assert self._process.stdin is not None
        try:
            for frame in (reference, distorted):
                self._process.stdin.write(np.ascontiguousarray(frame).data)
        except BrokenPipeError:
            raise RunError(self._failure()) from None

    def finish(self) -> list[float]:
        """Returns the VMAF of every pair, after the last one.

        Raises:
            RunError: ffmpeg failed.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            raise RunError(self._failure()) from None
        if self._process.wait() != 0:
            raise RunError(self._failure())
        log = json.loads(Path(self._folder.name, _LOG).read_text("utf-8"))
        return [float(frame["metrics"]["vmaf"]) for frame in log["frames"]]

    def _failure(self) -> str:
        status = self._process.wait()
        self._messages.seek(0)
        said = self._messages.read().decode(errors="replace").strip() or "nothing"
        return f"VMAF: ffmpeg ended with status {status} and said: {said}"
