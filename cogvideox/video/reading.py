"""Reading of video files."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path


def read_comment(path: Path) -> str | None:
    """Reads the comment tag of a video; None if it has none.

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
