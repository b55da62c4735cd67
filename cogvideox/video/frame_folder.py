"""Atomic replacement of a folder of PNG frames: a reader finds all old frames or all new ones.

The counterpart for a file is `runtime.files.atomic_path`. Standard library only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.files import flush, reporting_disk_errors

_OUR_NAME = re.compile(r"frame_\d{5,}\.png")


def frame_name(index: int) -> str:
    """Returns the file name of frame `index`, counted from 0."""
    return f"frame_{index:05d}.png"


def foreign_entries(folder: Path) -> list[str]:
    """Returns the sorted names in `folder` that are not frames; replacing it would lose them."""
    return sorted(e.name for e in folder.iterdir() if not _is_frame(e))


@contextmanager
def atomic_frame_folder(path: Path) -> Iterator[Path]:
    """Yields a new temporary folder beside `path`; on success it replaces `path`.

    An exception removes the temporary folder and leaves `path` as it was. A killed process leaves
    hidden folders beside `path`, which the next write of `path` removes.

    A folder cannot be renamed over one that holds files. So the old folder is renamed to a hidden
    name, the new one is renamed to `path`, and the old one's frames are deleted. After a kill
    between the two renames, the next write first moves the old folder back.

    Raises:
        WriteError: the disk is full or read-only.
    """
    with reporting_disk_errors(path):
        yield from _replaced(path)


def _replaced(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    retired = path.with_name(f".{path.name}.old")
    _remove_leftovers(path, retired)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            flush(file)
        flush(temporary)
        if path.exists():
            os.rename(path, retired)
        os.rename(temporary, path)
        flush(path.parent)
    finally:
        if temporary.exists():
            _remove_folder(temporary)
        if retired.exists() and not path.exists():
            os.rename(retired, path)
    if retired.exists():
        _remove_folder(retired)


def _remove_leftovers(path: Path, retired: Path) -> None:
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.tmp")
    for entry in list(path.parent.iterdir()):
        match = pattern.fullmatch(entry.name)
        # A leftover with this process's own id is dead: a restarted container often reuses it.
        if match and (int(match[1]) == os.getpid() or not Path("/proc", match[1]).exists()):
            _remove_folder(entry)
    if retired.exists() and path.exists():
        _remove_folder(retired)
    elif retired.exists():
        os.rename(retired, path)


def _is_frame(entry: Path) -> bool:
    return _OUR_NAME.fullmatch(entry.name) is not None and entry.is_file()


def _remove_folder(folder: Path) -> None:
    """Deletes the frames in a folder, then the folder, which must be empty after that."""
    for entry in list(folder.iterdir()):
        if _is_frame(entry):
            entry.unlink()
    folder.rmdir()
