"""Claims decide which process works on a job, in a folder that several machines may share.

The claims of a job are numbered files in one folder; the highest number is valid. A process claims
a job by creating the next number with link(2), which succeeds for one process only, and keeps it by
touching the file. The job is free again when its claim is released, expired, or held by a dead
process of this machine. Numbers are never reused, so a process that slept past the expiry finds a
higher number than its own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import threading
import uuid
from functools import cache
from pathlib import Path
from typing import Any

from runtime.errors import RunError

CLAIMS_FOLDER = "claims"
DEFAULT_EXPIRY = 120.0  # seconds without a touch; claims are touched four times as often


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claimed job."""

    path: Path  # JOB/claims/NUMBER


class Claims:
    """The claims of this process, a context manager. A thread touches their files."""

    def __init__(self, expiry: float = DEFAULT_EXPIRY):
        """
        Args:
            expiry: seconds without a touch after which others may take over.
        """
        self._expiry = expiry
        self._held: set[Claim] = set()
        self._closed = threading.Event()
        self._keeper = threading.Thread(target=self._keep_alive, daemon=True)

    def __enter__(self) -> Claims:
        self._keeper.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._keeper.join()
        for claim in list(self._held):
            self.release(claim)

    def take(self, job_folder: Path) -> Claim | None:
        """Claims the job of a folder; returns None if another process has it.

        Raises:
            RunError: the file system has no hard links, as that of a mounted bucket.
        """
        folder = job_folder / CLAIMS_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        latest = _latest(folder)
        temporary = folder / f".{uuid.uuid4().hex}"
        try:
            temporary.write_text(json.dumps(_this_process() | {"expiry": self._expiry}), "utf-8")
            # The file server's clock; the clocks of the machines may differ by minutes.
            now = temporary.stat().st_mtime
            if latest and _is_alive(folder / str(latest), now):
                return None
            claim = Claim(folder / str(latest + 1))
            try:
                os.link(temporary, claim.path)
            except FileExistsError:
                # NFS also reports this for a link that it made if the first reply was lost.
                if temporary.stat().st_nlink != 2:
                    return None
            except OSError as error:
                raise RunError(f"{folder} cannot be claimed by link(2): {error}") from error
        finally:
            temporary.unlink(missing_ok=True)
        self._held.add(claim)
        return claim

    def holds(self, claim: Claim) -> bool:
        """Whether the claim is still valid; it is not after this process slept past the expiry."""
        return claim in self._held and _latest(claim.path.parent) == int(claim.path.name)

    def release(self, claim: Claim) -> None:
        """Frees the job."""
        self._held.discard(claim)
        if claim.path.exists():  # else someone deleted the job's folder
            os.utime(claim.path, (0, 0))

    def _keep_alive(self) -> None:
        while not self._closed.wait(self._expiry / 4):
            for claim in list(self._held):
                try:
                    os.utime(claim.path)
                except OSError as error:
                    # The next touch may succeed; `holds` tells if it came too late.
                    print(f"warning: cannot touch {claim.path}: {error}")


def is_claimed(job_folder: Path, now: float) -> bool:
    """Whether a living process has claimed the job; `now` in seconds since 1970."""
    folder = job_folder / CLAIMS_FOLDER
    latest = _latest(folder) if folder.is_dir() else 0
    return latest > 0 and _is_alive(folder / str(latest), now)


def _latest(folder: Path) -> int:
    return max((int(name) for name in os.listdir(folder) if name.isdecimal()), default=0)


def _is_alive(path: Path, now: float) -> bool:
    touched = path.stat().st_mtime
    owner = json.loads(path.read_text("utf-8"))
    if touched == 0:  # released
        return False
    if owner["machine"] == _machine() and _start_time(owner["pid"]) != owner["started"]:
        return False
    return now - touched < owner["expiry"]


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": pid,
        "started": _start_time(pid),
    }


@cache
def _machine() -> str:
    """Identifies the boot of this machine and the namespace of its process ids."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _start_time(pid: int) -> str | None:
    """When a living process started, in ticks since boot; None for a dead one."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name before the last parenthesis can hold anything.
    state, *fields = stat.rpartition(")")[2].split()
    return None if state == "Z" else fields[18]
