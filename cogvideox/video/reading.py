"""Reading of video files."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from runtime.files import check_regular

_MAX_BYTES = 4 << 20  # tags of this project have up to 1 MiB, before ffmpeg escapes them


def read_comment(path: Path) -> str | None:
    """Reads the comment tag of a video; None if it has none.

    Raises:
        ValueError: it is not a regular file, ffmpeg cannot read it, or its tags are too long.
    """
    from imageio_ffmpeg import get_ffmpeg_exe

    check_regular(path)  # ffmpeg would wait for the other end of a named pipe
    command = [get_ffmpeg_exe(), "-v", "error", "-i", f"file:{path}", "-f", "ffmetadata", "-"]
    ffmpeg = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    if ffmpeg.returncode != 0:
        raise ValueError(f"ffmpeg cannot read {path}: {ffmpeg.stderr.decode(errors='replace')}")
    if len(ffmpeg.stdout) > _MAX_BYTES:
        raise ValueError(f"the tags of {path} are longer than {_MAX_BYTES:,} bytes")
    metadata = ffmpeg.stdout.decode(errors="replace")
    found = re.search(r"^comment=((?:[^\\\n]|\\.)*)$", metadata, re.DOTALL | re.MULTILINE)
    return re.sub(r"\\(.)", r"\1", found[1], flags=re.DOTALL) if found else None
