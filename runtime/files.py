"""Atomic files: a reader finds the old file or the new one, never half of one."""

import contextlib
import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; on success it is flushed and renamed to `path`.

    On an exception the temporary file is removed and `path` is left as it was. A process that is
    killed outright leaves only the temporary name, which the next write of `path` removes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    # The host is in the name, because a shared disk shows processes of other machines' numbers.
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Writes `value` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def flush(path: Path) -> None:
    """Waits until a file's or folder's data is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(path: Path) -> None:
    """Removes temporary files of `path` whose process, on this host, no longer lives."""
    start = re.escape(f".{path.name}.{socket.gethostname()}.")
    pattern = re.compile(start + r"(\d+)\.tmp")
    for entry in path.parent.iterdir():
        match = pattern.fullmatch(entry.name)
        if match and not Path("/proc", match[1]).exists():
            entry.unlink(missing_ok=True)
