"""A copy of a batch's folder at an fsspec URL, such as a bucket that outlives the machine.

Files are copied when a job pauses or ends, the records last. A run first fetches the files that
this machine lacks. A damaged copy does not match the checksum in its record, so its stage runs
again.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from fsspec.core import url_to_fs

from jobs.records import Job
from runtime.files import atomic_path

_Version = tuple[int, int]  # size and time of change


class Mirror:
    """Copies between a batch's folder and a URL; threads may share it."""

    def __init__(self, url: str, output_dir: Path):
        """
        Raises:
            ValueError: the kind of URL is unknown, or its package is not installed.
        """
        try:
            self._files, self._root = url_to_fs(url)
        except ImportError as error:
            raise ValueError(f"--mirror {url}: {error}") from error
        self._output_dir = output_dir
        self._copied: dict[Path, _Version] = {}
        self._lock = threading.Lock()

    def pull(self, jobs: Sequence[Job]) -> int:
        """Fetches the files of these jobs that this machine lacks; returns how many."""
        there = self._files.find(self._root, detail=True) if self._files.exists(self._root) else {}
        wanted, fetched = {job.folder for job in jobs}, 0
        prefix = self._root.rstrip("/") + "/"
        for key, details in there.items():
            folder, _, name = key.removeprefix(prefix).partition("/")
            if folder not in wanted or "/" in name:
                continue
            path = self._output_dir / folder / name
            if not path.exists():
                with atomic_path(path) as temporary:
                    self._files.get_file(key, str(temporary))
                fetched += 1
            if path.stat().st_size == details["size"] and path.suffix != ".json":
                self._copied[path] = _version(path)
        return fetched

    def push(self, job: Job) -> None:
        """Copies the files that changed in a job's folder."""
        folder = self._output_dir / job.folder
        paths = [p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")]
        with self._lock:
            for path in sorted(paths, key=lambda path: (path.suffix == ".json", path.name)):
                version = _version(path)
                if self._copied.get(path) != version:
                    target = f"{self._root.rstrip('/')}/{job.folder}/{path.name}"
                    self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
                    self._files.put_file(str(path), target)
                    self._copied[path] = version


def _version(path: Path) -> _Version:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
