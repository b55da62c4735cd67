"""The output folder of a run, watched so that its removal is noticed."""

from __future__ import annotations

import os
from pathlib import Path

from runtime import processes
from runtime.errors import RunError
from runtime.files import reporting_disk_errors
from runtime.text import printable


class OpenFolder:
    """Keeps a folder open, to recognize another folder of the same name.

    Use it in a `with`.
    """

    def __init__(self, path: Path):
        self._path = path
        self._descriptor: int | None = None

    def __enter__(self) -> OpenFolder:
        if processes.is_first():  # others write nothing
            with reporting_disk_errors(self._path):
                self._path.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY)
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def check(self) -> None:
        """Raises RunError if the folder was removed, moved or replaced since it was opened."""
        if self._descriptor is None:
            return
        # An open folder keeps its inode number, so a new folder cannot have the same one.
        opened = os.fstat(self._descriptor)
        try:
            now = os.stat(self._path)
        except OSError:
            now = None
        if now is None or not os.path.samestat(opened, now):
            raise RunError(
                f"{printable(str(self._path))} was removed, moved or replaced during the run; "
                "run the same command again to make what is missing"
            )
