"""A copy of a batch's folder at an fsspec URL, such as a bucket that outlives the machine.

Files are copied when a job pauses or ends, the records last. A run first fetches the files that
this machine lacks. A damaged copy does not match the checksum in its record, so its stage runs
again.

Other people may be able to write to the mirror. Only files that `records.is_job_file` knows are
read and written, each under a temporary name that is then renamed, and no link in the mirror is
followed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from jobs.records import Job, is_job_file
from runtime.files import atomic_path

_Version = tuple[int, int]  # size and time of change


class _Store(Protocol):
    """Files of jobs in a mirror."""

    def sizes(self, job: str) -> dict[str, int]:
        """The regular files of a job by name, with their sizes in bytes."""
        ...

    def get(self, job: str, name: str, target: Path) -> None: ...

    def put(self, source: Path, job: str, name: str) -> None:
        """Replaces a file at once: a reader finds the old one or the new one."""
        ...

    def delete(self, job: str, names: Sequence[str]) -> None:
        """Deletes files of a job, and its folder if nothing else is in it."""
        ...


class Mirror:
    """Copies between a batch's folder and a URL; threads may share it."""

    def __init__(self, url: str, output_dir: Path):
        """
        Raises:
            ValueError: the kind of URL is unknown, or its package is not installed.
        """
        try:
            files, root = url_to_fs(url)
        except ImportError as error:
            raise ValueError(f"--mirror {url}: {error}") from error
        self._store: _Store
        if isinstance(files, LocalFileSystem):
            self._store = _Folder(Path(root))
        else:
            self._store = _Remote(files, root.rstrip("/"))
        self._output_dir = output_dir
        self._copied: dict[Path, _Version] = {}
        self._lock = threading.Lock()

    def pull(self, jobs: Sequence[Job]) -> int:
        """Fetches the files of these jobs that this machine lacks; returns how many."""
        fetched = 0
        for job in jobs:
            for name, size in self._store.sizes(job.folder).items():
                path = self._output_dir / job.folder / name
                if not os.path.lexists(path):
                    with atomic_path(path) as temporary:
                        self._store.get(job.folder, name, temporary)
                    fetched += 1
                if _is_regular(path) and path.suffix != ".json":
                    version = _version(path)
                    if version[0] == size:
                        self._copied[path] = version
        return fetched

    def push(self, job: Job) -> None:
        """Copies the files that changed in a job's folder."""
        folder = self._output_dir / job.folder
        names = filter(is_job_file, os.listdir(folder)) if folder.is_dir() else ()
        paths = [folder / name for name in names if _is_regular(folder / name)]
        with self._lock:
            for path in sorted(paths, key=lambda path: (path.suffix == ".json", path.name)):
                version = _version(path)
                if self._copied.get(path) != version:
                    self._store.put(path, job.folder, path.name)
                    self._copied[path] = version

    def delete(self, job: Job) -> int:
        """Deletes the copies of a job's files; returns how many. Files of others stay."""
        names = sorted(self._store.sizes(job.folder))
        if names:
            self._store.delete(job.folder, names)
        return len(names)


class _Folder:
    """A mirror in a folder. Follows no link below it: every name is looked up in an open folder."""

    def __init__(self, root: Path):
        self._root = root

    def sizes(self, job: str) -> dict[str, int]:
        sizes = {}
        with contextlib.suppress(FileNotFoundError), self._open(job) as folder:
            for name in filter(is_job_file, os.listdir(folder)):
                found = os.stat(name, dir_fd=folder, follow_symlinks=False)
                if stat.S_ISREG(found.st_mode):
                    sizes[name] = found.st_size
        return sizes

    def get(self, job: str, name: str, target: Path) -> None:
        # O_NONBLOCK: a FIFO that has just taken the file's place must not make this wait.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        with self._open(job) as folder:
            descriptor = os.open(name, flags, dir_fd=folder)
        with open(descriptor, "rb") as source, open(target, "wb") as copy:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(f"{self._root / job / name} is not a regular file")
            shutil.copyfileobj(source, copy)

    def put(self, source: Path, job: str, name: str) -> None:
        self._root.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (self._root / job).mkdir()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        temporary = _temporary(name)
        with self._open(job) as folder:
            try:
                descriptor = os.open(temporary, flags, 0o644, dir_fd=folder)
                with open(source, "rb") as content, open(descriptor, "wb") as copy:
                    shutil.copyfileobj(content, copy)
                    copy.flush()
                    os.fsync(descriptor)
                os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=folder)
                raise

    def delete(self, job: str, names: Sequence[str]) -> None:
        with self._open(job) as folder:
            for name in names:
                os.unlink(name, dir_fd=folder)
        with contextlib.suppress(OSError):  # files of others are in it
            (self._root / job).rmdir()

    @contextlib.contextmanager
    def _open(self, job: str) -> Iterator[int]:
        """Opens a job's folder, unless it is a link."""
        flags = os.O_RDONLY | os.O_DIRECTORY
        root = os.open(self._root, flags)
        try:
            folder = os.open(job, flags | os.O_NOFOLLOW, dir_fd=root)
        finally:
            os.close(root)
        try:
            yield folder
        finally:
            os.close(folder)


class _Remote:
    """A mirror on any other file system of fsspec."""

    def __init__(self, files: AbstractFileSystem, root: str):
        self._files, self._root = files, root

    def sizes(self, job: str) -> dict[str, int]:
        self._files.invalidate_cache()
        try:
            listed = self._files.ls(f"{self._root}/{job}", detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        found = ((entry["name"].rpartition("/")[2], entry) for entry in listed)
        return {
            name: entry["size"]
            for name, entry in found
            if is_job_file(name) and entry["type"] == "file" and not entry.get("islink")
        }

    def get(self, job: str, name: str, target: Path) -> None:
        self._files.get_file(f"{self._root}/{job}/{name}", str(target))

    def put(self, source: Path, job: str, name: str) -> None:
        folder = f"{self._root}/{job}"
        target, temporary = f"{folder}/{name}", f"{folder}/{_temporary(name)}"
        self._files.makedirs(folder, exist_ok=True)
        self._require_no_link(folder, "directory")
        try:
            self._files.put_file(str(source), temporary)
            self._require_no_link(target, "file")
            self._files.mv(temporary, target)
        except BaseException:
            with contextlib.suppress(Exception):  # the first error says more
                self._files.rm_file(temporary)
            raise

    def delete(self, job: str, names: Sequence[str]) -> None:
        folder = f"{self._root}/{job}"
        self._require_no_link(folder, "directory")
        for name in names:
            self._files.rm_file(f"{folder}/{name}")
        with contextlib.suppress(OSError):  # files of others are in it; buckets have no folders
            self._files.rmdir(folder)

    def _require_no_link(self, path: str, kind: str) -> None:
        """Checks that a path is absent or of this kind.

        Raises:
            OSError: it is a link, or of another kind.
        """
        self._files.invalidate_cache()
        try:
            found = self._files.info(path)
        except FileNotFoundError:
            return
        if found.get("islink") or found["type"] != kind:
            raise OSError(f"{path} in the mirror is not a {kind}; delete it")


def _temporary(name: str) -> str:
    """Returns a name that nobody can predict."""
    return f".{name}.{uuid.uuid4().hex}.tmp"


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _version(path: Path) -> _Version:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
