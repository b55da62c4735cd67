"""Write a file or a folder so that its name only ever holds the old content or the new.

Everything is written under a temporary name in the same folder (a rename across file systems is
not atomic), flushed to the disk, and renamed. Standard library only.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def temporary_path(path: Path) -> Path:
    """The hidden name beside `path` under which this process writes it.

    Host and process id are in the name: two runs never write the same temporary, and a later run
    can tell a leftover of a killed process from the work of a living one.
    """
    return path.with_name(f"{_temporary_prefix(path)}{os.getpid()}")


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; rename it over `path` when the block ends well.

    An exception inside the block removes the temporary and leaves `path` as it was. Leftovers of
    killed runs that wrote the same `path` are removed first. The parent folder must exist.
    """
    remove_leftovers(path)
    temporary = temporary_path(path)
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush(path.parent)


@contextmanager
def replacing_folder(path: Path, owned: str) -> Iterator[Path]:
    """Yield a new temporary folder to fill; it takes the place of the folder `path` at the end.

    A folder cannot be renamed over one that holds files, so the old one steps aside, the new one
    takes the name, and the old one is deleted: of it, only files that match the glob `owned`. A
    kill between the two renames is put right by the next run, which moves the old folder back.
    """
    remove_leftovers(path)
    retired = path.with_name(f".{path.name}.retired")
    if retired.exists():
        if path.exists():
            _remove_folder(retired, owned)
        else:
            os.rename(retired, path)
    temporary = temporary_path(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            _flush(file)
        _flush(temporary)
        if path.exists():
            os.rename(path, retired)
        os.rename(temporary, path)
    except BaseException:
        if temporary.exists():
            _remove_folder(temporary, "*")
        if retired.exists() and not path.exists():
            os.rename(retired, path)
        raise
    _flush(path.parent)
    if retired.exists():
        _remove_folder(retired, owned)


def remove_leftovers(path: Path) -> None:
    """Remove temporaries for `path` that processes of this host left when they were killed."""
    pattern = re.compile(re.escape(_temporary_prefix(path)) + r"(\d+)")
    for entry in list(path.parent.iterdir()):
        match = pattern.fullmatch(entry.name)
        if match is None or _is_other_living_process(int(match[1])):
            continue
        if entry.is_dir():
            _remove_folder(entry, "*")
        else:
            entry.unlink()


def _temporary_prefix(path: Path) -> str:
    return f".{path.name}.partial-{socket.gethostname()}-"


def _is_other_living_process(pid: int) -> bool:
    if pid == os.getpid():  # a restarted container often gets the same id again
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it lives, under another user
        return True
    return True


def _remove_folder(folder: Path, owned: str) -> None:
    """Delete the matching files of a flat folder, then the folder, which must then be empty."""
    for file in folder.glob(owned):
        file.unlink()
    folder.rmdir()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
