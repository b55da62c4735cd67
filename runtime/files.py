"""Regular files only, and atomic files: a reader finds the old file or the new one, never half."""

import contextlib
import errno
import hashlib
import json
import os
import re
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from runtime.errors import InputError, RunError
from runtime.text import printable

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
# The disk's answers, whichever call got them.
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.ESTALE)
# Longer names are hashed, because a temporary name adds the host's and must fit into 255 bytes.
_LONGEST_STEM = 120


class WriteError(RunError, OSError):
    """A file cannot be written: the disk is full or read-only, or the folder is gone.

    Attributes:
        errno: of the system call that failed.
    """

    def __init__(self, message: str, number: int | None) -> None:
        super().__init__(message)
        self.message = message
        self.errno = number

    def __str__(self) -> str:
        return self.message


def open_regular(path: Path, *, follow_symlinks: bool = True) -> BinaryIO:
    """Opens a regular file for reading; never waits for another process.

    Args:
        follow_symlinks: the hub's cache holds symlinks to its files. False refuses them, for
            folders that others may write.

    Raises:
        InputError: there is no such file, it cannot be read, or it is a folder, a named pipe, a
            device or a socket.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        kind = _kind(path, follow_symlinks)
        if kind:
            raise InputError(f"{printable(str(path))} is {kind}; it should be a file")
        descriptor = os.open(path, flags if follow_symlinks else flags | os.O_NOFOLLOW)
    except OSError as error:
        raise InputError(f"cannot read {printable(str(path))}: {error.strerror}") from error
    except ValueError as error:  # a NUL or a surrogate in the name
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read {printable(str(path))}: {error}") from error
    file = open(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # replaced since
        file.close()
        raise InputError(f"{printable(str(path))} is not a regular file")
    return file


def checksum(path: Path) -> str:
    """The sha256 of a regular file, in hexadecimal.

    Raises:
        InputError: the file cannot be opened, or is not a regular file.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_regular(path: Path, *, follow_symlinks: bool = True) -> None:
    """Checks what libraries will open by its name; see `open_regular`."""
    open_regular(path, follow_symlinks=follow_symlinks).close()


def _kind(path: Path, follow_symlinks: bool) -> str | None:
    """What `path` is if it is no regular file. Looks first: opening some devices acts on them."""
    mode = os.stat(path, follow_symlinks=follow_symlinks).st_mode
    if stat.S_ISREG(mode):
        return None
    return _KINDS.get(stat.S_IFMT(mode), "a symbolic link")


@contextlib.contextmanager
def atomic_path(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yields a temporary name beside `path`; on success it is flushed and renamed to `path`.

    On an exception the temporary file is removed and `path` is left as it was. A process that is
    killed outright leaves only the temporary name, which the next write of `path` removes.

    Args:
        durable: False does not flush: for what nobody needs after a power cut.

    Raises:
        WriteError: the disk is full or read-only, or the folder does not let `path` be written;
            also if the body fails so. One line that names `path`.
    """
    with reporting_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        temporary = path.with_name(f"{_temporary_start(path)}{os.getpid()}.tmp")
        try:
            yield temporary
            if durable:
                flush(temporary)
            os.replace(temporary, path)
            if durable:
                flush(path.parent)
        finally:
            # A disk that has become read-only refuses this, too; the first error says more.
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def reporting_disk_errors(path: Path) -> Iterator[None]:
    """Turns an OSError of writing `path` into a WriteError; others pass.

    Raises:
        WriteError: naming `path` and the reason.
    """
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        ours = error.filename is not None and _is_beside(error.filename, path)
        if error.errno in WRITE_ERRORS or ours:
            line = f"cannot write {printable(str(path))}: {error.strerror or error}"
            raise WriteError(line, error.errno) from error
        raise


def _is_beside(filename: object, path: Path) -> bool:
    """Whether a failed call was about `path`, its temporary file or a folder above it."""
    if not isinstance(filename, str | os.PathLike):
        return False
    name = Path(filename)
    return name.parent == path.parent or name in path.parents


def write_json(path: Path, value: object, *, durable: bool = True) -> None:
    """Writes `value` as indented JSON, atomically; `durable` as of `atomic_path`."""
    with atomic_path(path, durable=durable) as temporary:
        temporary.write_text(to_text(value), "utf-8")


def to_text(value: object) -> str:
    """The JSON that `write_json` writes."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def flush(path: Path) -> None:
    """Waits until a file's or folder's data is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary_start(path: Path) -> str:
    """How temporary names of `path` begin; a process id and a suffix follow.

    The host is in the name, because a shared disk shows processes of other machines' numbers.
    """
    stem = path.name
    if len(os.fsencode(stem)) > _LONGEST_STEM:
        stem = hashlib.sha256(os.fsencode(stem)).hexdigest()[:32]
    return f".{stem}.{socket.gethostname()}."


def _remove_leftovers(path: Path) -> None:
    """Removes temporary files of `path` whose process, on this host, no longer lives."""
    pattern = re.compile(re.escape(_temporary_start(path)) + r"(\d+)\.tmp")
    for entry in path.parent.iterdir():
        match = pattern.fullmatch(entry.name)
        if match and not Path("/proc", match[1]).exists():
            entry.unlink(missing_ok=True)
