"""Claims: which process works on a job, on a folder that several machines may share.

The claims of a job are numbered files in one folder, and the highest number counts. A process takes
a job by making the next number, which link(2) lets only one process do, and keeps it by touching
the file. The job is free again when its claim is released, too old, damaged, or of a dead process
of this machine. Numbers never come back, so a process that was taken for dead and wakes up finds a
higher one than its own.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import socket
import threading
import time
import uuid
from functools import cache
from pathlib import Path
from typing import Literal

from runtime.errors import InputError, RunError
from runtime.files import flush
from runtime.text import printable
from runtime.typed_json import from_json, read_object

CLAIMS_FOLDER = "claims"
DEFAULT_EXPIRY = 120.0  # seconds without a sign of life; signs come four times as often
MAX_EXPIRY = 86400.0
# Other names are not ours. No counter reaches ten digits.
_NUMBER = re.compile(r"[1-9][0-9]{0,8}", re.ASCII)
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}", re.ASCII)
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)

ClaimState = Literal["free", "alive", "abandoned", "ahead"]


@dataclasses.dataclass(frozen=True)
class Claim:
    """One taken job."""

    path: Path  # JOB/claims/NUMBER


@dataclasses.dataclass(frozen=True)
class _Owner:
    """What a claim's file says."""

    host: str
    machine: str
    pid: int
    started: str | None
    expiry: float


class Claims:
    """The claims that this process holds; a thread keeps them alive. Use it in a `with`."""

    def __init__(self, expiry: float = DEFAULT_EXPIRY):
        """Args: expiry: seconds without a sign of life after which others may take over."""
        self._expiry = expiry
        self._held: set[Claim] = set()
        # Claims of clocks that are ahead: when they say they were touched, and since when.
        self._ahead: dict[Path, tuple[float, float]] = {}
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
        """Takes the job of this folder, or returns None because another process has it.

        Raises:
            RunError: the file system, such as that of a mounted bucket, has no hard links.
            OSError: the folder does not exist or cannot be written.
            InputError: the claims' numbers are used up.
        """
        folder = job_folder / CLAIMS_FOLDER
        folder.mkdir(exist_ok=True)
        latest = _latest(folder)
        temporary = folder / f".{uuid.uuid4().hex}"
        try:
            owner = dataclasses.replace(_this_process(), expiry=self._expiry)
            temporary.write_text(json.dumps(dataclasses.asdict(owner)), "utf-8")
            # A claim that survives a power cut must not be empty.
            flush(temporary)
            # The file server's clock: those of the machines may differ by minutes.
            now = temporary.stat().st_mtime
            if latest and self._is_taken(folder / str(latest), now):
                return None
            claim = Claim(folder / str(latest + 1))
            if not _NUMBER.fullmatch(claim.path.name):
                raise InputError(f"{folder / str(latest)} is no claim of this program; delete it")
            try:
                os.link(temporary, claim.path)
            except FileExistsError:
                # Over NFS a link that was made can be reported so when the first reply was lost.
                if temporary.stat().st_nlink != 2:
                    return None
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                raise RunError(f"{folder} cannot be claimed by link(2): {error}") from error
        finally:
            temporary.unlink(missing_ok=True)
        self._held.add(claim)
        return claim

    def holds(self, claim: Claim) -> bool:
        """Whether the job is still this process's; not so after it slept past the expiry."""
        if claim not in self._held or not claim.path.exists():
            return False
        return _latest(claim.path.parent) == int(claim.path.name)

    def release(self, claim: Claim) -> None:
        """Frees the job."""
        self._held.discard(claim)
        try:
            os.utime(claim.path, (0, 0))
        except FileNotFoundError:  # someone deleted the job's folder
            return

    def _is_taken(self, path: Path, now: float) -> bool:
        """Whether another process works on the job of this claim; `now` by the file's clock."""
        try:
            state, touched, expiry = _inspect(path, now)
        except InputError as error:
            # Claims are flushed before they get their number, so no living process wrote this.
            print(f"warning: taking over a job whose claim is damaged: {printable(str(error))}")
            return False
        if state != "ahead":
            return state == "alive"
        # The times cannot be compared. A living process touches its claim again before it expires.
        seen, since = self._ahead.get(path, (None, 0.0))
        if seen != touched:
            since = time.monotonic()
            self._ahead[path] = touched, since
        return time.monotonic() - since < expiry

    def _keep_alive(self) -> None:
        while not self._closed.wait(self._expiry / 4):
            for claim in list(self._held):
                try:
                    os.utime(claim.path)
                except OSError as error:
                    # The next sign of life may get through; `holds` tells whether it came too late.
                    print(f"warning: {claim.path} could not be kept alive: {error}")


def claim_state(job_folder: Path, now: float) -> ClaimState:
    """Tells whether a process works on a job, or did and ended without releasing it.

    Args:
        now: seconds since 1970.

    Returns:
        "free": never claimed, or released. "alive". "abandoned": the process is dead or silent,
        or its claim is damaged. "ahead": touched in the future, by a clock that is wrong.
    """
    folder = job_folder / CLAIMS_FOLDER
    try:
        latest = _latest(folder)
        return _inspect(folder / str(latest), now)[0] if latest else "free"
    except FileNotFoundError:
        return "free"
    except (OSError, InputError):
        return "abandoned"


def is_claimed(job_folder: Path, now: float) -> bool:
    """Whether a living process works on the job; `now` in seconds since 1970."""
    return claim_state(job_folder, now) == "alive"


def is_claims_file(name: str) -> bool:
    """Whether a file in a folder of claims is one of this module's, by its name."""
    return bool(_NUMBER.fullmatch(name) or _TEMPORARY.fullmatch(name))


def _latest(folder: Path) -> int:
    return max((int(name) for name in os.listdir(folder) if _NUMBER.fullmatch(name)), default=0)


def _inspect(path: Path, now: float) -> tuple[ClaimState, float, float]:
    """The state of a claim, when it was touched, and after how many seconds it expires.

    Raises:
        InputError: the claim is damaged.
    """
    touched = path.stat().st_mtime
    if touched == 0:
        return "free", touched, 0.0
    try:
        owner = from_json(_Owner, read_object(path))
        if not 0 < owner.expiry <= MAX_EXPIRY or not 0 < owner.pid < 1 << 31:
            raise ValueError("expiry or pid is out of range")
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path} is not a claim: {error}") from error
    if owner.machine == _machine() and _start_time(owner.pid) != owner.started:
        return "abandoned", touched, owner.expiry
    age = now - touched
    if age >= owner.expiry:
        return "abandoned", touched, owner.expiry
    return "alive" if age > -owner.expiry else "ahead", touched, owner.expiry


def _this_process() -> _Owner:
    pid = os.getpid()
    return _Owner(socket.gethostname(), _machine(), pid, _start_time(pid), DEFAULT_EXPIRY)


@cache
def _machine() -> str:
    """This boot of this machine and, in it, the namespace that process numbers belong to."""
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
