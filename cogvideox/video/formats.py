"""Output formats of a video: `.mp4`, `.gif`, `.webp`, `.npy`, or a folder of PNG images.

The suffix of the output path selects the format. Standard library only, so that a path can be
checked before anything heavy is imported.
"""

from __future__ import annotations

import os
from pathlib import Path

from cogvideox.video.frame_folder import foreign_entries

FILE_SUFFIXES = (".mp4", ".gif", ".webp", ".npy")
QUALITY_SUFFIXES = (".mp4", ".webp")
DEFAULT_QUALITY = 7
# 255 is the limit of most file systems; the temporary name adds a process id and five more.
_MAX_NAME_BYTES = 240


def wants_float(path: Path) -> bool:
    """Returns whether the output stores float32 frames in 0..1 (`.npy`) instead of uint8."""
    return path.suffix.lower() == ".npy"


def check_output_path(
    path: Path,
    *,
    fps: int | None = None,
    quality: int | None = None,
    option: str = "--output_video",
) -> None:
    """Checks that a video can be written to `path` with these settings.

    Changes nothing on the disk: missing parent folders are made when writing starts.

    Args:
        path: the output; its suffix selects the format.
        fps: frames a second; None skips the check.
        quality: 0 to 10; None is the default.
        option: the argument that named the path, for the message.

    Raises:
        ValueError: a video cannot be written there, in one line.
    """
    problem = _path_problem(path)
    if problem is not None:
        raise ValueError(f"{option} {str(path)!r}: {problem}")
    problem = _settings_problem(path.suffix.lower(), fps, quality)
    if problem is not None:
        raise ValueError(problem)


def _settings_problem(suffix: str, fps: int | None, quality: int | None) -> str | None:
    if fps is not None and fps < 1:
        return f"--fps {fps}: must be at least 1"
    if fps is not None and fps > 50 and suffix == ".gif":
        return f"--fps {fps}: must be at most 50 for .gif, the limit of GIF players"
    if quality is not None and suffix not in QUALITY_SUFFIXES:
        return f"--quality {quality}: only {' and '.join(QUALITY_SUFFIXES)} take a quality"
    if quality is not None and not 0 <= quality <= 10:
        return f"--quality {quality}: must be from 0 to 10"
    return None


def _path_problem(path: Path) -> str | None:
    choices = f"use one of {', '.join(FILE_SUFFIXES)}, or no suffix for a folder of PNG frames"
    if path.name in ("", ".."):
        return "not a name; name a file or a new folder"
    if path.name.lower() in FILE_SUFFIXES:
        return "there is no name before the suffix"
    if path.suffix and path.suffix.lower() not in FILE_SUFFIXES:
        return f"unknown suffix {path.suffix!r}; {choices}"
    excess = max(len(os.fsencode(part)) for part in path.parts) - _MAX_NAME_BYTES
    if excess > 0:
        return f"a name in the path is too long by {excess} bytes"
    target = path.resolve()
    if path.suffix and target.exists() and not target.is_file():
        return f"exists and is not a file; a {path.suffix} output must be a file"
    if not path.suffix and target.exists():
        if not target.is_dir():
            return f"exists and is not a folder; {choices}"
        foreign = foreign_entries(target)
        if foreign:
            return f"the folder holds other files than frames, such as {foreign[0]!r}"
    existing = target.parent
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        return f"{str(existing)!r} is not a folder"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"the folder {str(existing)!r} is not writable"
    return None
