"""Works on the jobs of a folder as they come, the oldest first, until it is stopped.

A server adds jobs; any number of these workers, on one machine or several, may serve one folder.
What is loaded and compiled stays so. A job with `cancel.json` in its folder is deleted by the
worker that holds it, after the running step.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from cogvideox.model.folder import ModelFolder
from jobs.claims import Claim
from jobs.ledger import CONFIG, DONE, FAILED
from jobs.options import BatchOptions
from jobs.prune import delete_folder
from jobs.records import CANCEL_FILE, JOB_FILE, STAGES, Job, read_job
from jobs.runner import Runner
from jobs.steps import show_activity, show_steps
from runtime.devices import start_jax
from runtime.errors import InputError
from runtime.progress import working
from runtime.text import printable
from stages.denoise import StoppedBetweenSteps
from stages.session import Session, Shape

ENCODE, DENOISE, DECODE = STAGES
_POLL_SECONDS = 2.0  # for jobs that came without a word on stdin
_DECODES_WAITING = 1


class Service(Runner):
    """Makes the videos of a folder's jobs, also of those that come later."""

    def __init__(
        self,
        model: ModelFolder,
        options: BatchOptions,
        stop: threading.Event,
        wake: threading.Event,
    ):
        """
        Args:
            stop: ends the run after the running stage, or at a checkpoint.
            wake: is set when a job has come, and with `stop`.
        """
        super().__init__([], model, options, stop)
        self._session = Session(model, stop, self._abort, _until_canceled, show_activity)
        self._wake = wake
        self._checked: set[Shape] = set()
        # Folders that need nothing more, with when they were last changed.
        self._ended: dict[str, int] = {}
        self._unreadable: set[str] = set()
        self._decodes: deque[Future] = deque()

    def _work_until_done(self) -> None:
        with working("importing torch and JAX, starting the devices"):
            import torch  # noqa: F401 (before the first request needs it)

            start_jax(self._options.dtype)
        print("the worker waits for requests")
        with contextlib.closing(_Pool()) as pool:
            while not self._stop.is_set():
                self._wake.clear()
                self._folder.check()
                taken = self._take_next()
                if taken:
                    self._make(*taken, pool)
                elif self._decodes:
                    self._decodes.popleft().result()
                else:
                    self._wake.wait(_POLL_SECONDS)
            for decode in self._decodes:
                decode.result()

    def _take_next(self) -> tuple[Job, Claim] | None:
        """Claims the oldest job that needs work."""
        for job in self._waiting():
            folder = self._output_dir / job.folder
            try:
                claim = self._claims.take(folder)
            except FileNotFoundError:  # deleted meanwhile
                continue
            except (OSError, InputError) as error:
                self._require_disk(error)
                self.ledger.fail(job, f"cannot be claimed: {error}")
                continue
            if claim is None:
                continue
            if self._needs_work(job):
                return job, claim
            self._release(job, claim)
        return None

    def _waiting(self) -> list[Job]:
        """The jobs of the folder that are neither done nor failed, the oldest first."""
        found = []
        with os.scandir(self._output_dir) as entries:
            changed = {
                entry.name: entry.stat().st_mtime_ns
                for entry in entries
                if not entry.name.startswith(".") and entry.is_dir()
            }
        for name, version in changed.items():
            folder = self._output_dir / name
            if self._ended.get(name) == version:
                continue
            try:
                job = read_job(folder)
            except InputError as error:
                if (folder / JOB_FILE).exists() and name not in self._unreadable:
                    print(f"warning: skipping a job: {printable(str(error))}")
                self._unreadable.add(name)
                continue
            if job.folder == name and self._needs_work(job):
                found.append(job)
            else:
                self._ended[name] = version
        return sorted(found, key=lambda job: (job.accepted or 0.0, job.line, job.folder))

    def _needs_work(self, job: Job) -> bool:
        folder = self._output_dir / job.folder
        if (folder / CANCEL_FILE).exists():
            return True
        if not (folder / JOB_FILE).exists():
            return False
        return self.ledger.next(job) not in (DONE, FAILED)

    def _make(self, job: Job, claim: Claim, pool: _Pool) -> None:
        """Runs the stages of a claimed job; the last one in a thread, while the next job begins."""
        if self._delete_if_canceled(job, claim):
            return
        if self.ledger.next(job) == CONFIG:
            self._repair_config(job)
        for stage in (ENCODE, DENOISE):
            if self.ledger.next(job) == stage and not self._stop.is_set():
                self._do(stage, job, claim)
                if self._delete_if_canceled(job, claim):
                    return
        if self.ledger.next(job) != DECODE or self._stop.is_set():
            self._finish(job, claim)
            return
        show_activity(self._output_dir / job.folder, "waiting for the decoder")
        self._decodes.append(pool.submit(self._decode, job, claim))
        while len(self._decodes) > _DECODES_WAITING:
            self._decodes.popleft().result()

    def _decode(self, job: Job, claim: Claim) -> None:
        if not self._stop.is_set():
            self._do(DECODE, job, claim)
        if not self._delete_if_canceled(job, claim):
            self._finish(job, claim)

    def _progress(self) -> str:
        return "ended"

    def _work(self, stage: str, job: Job) -> dict:
        self._unprepared.clear()  # what failed for one request may work for the next
        if job.shape not in self._checked:
            request = self._options.request(job)
            self._session.check([request], [ENCODE] if stage == ENCODE else [], self._output_dir)
            self._checked.add(job.shape)
        return super()._work(stage, job)

    def _delete_if_canceled(self, job: Job, claim: Claim) -> bool:
        folder = self._output_dir / job.folder
        if not (folder / CANCEL_FILE).exists():
            return False
        delete_job(folder)
        self._claims.release(claim)
        print(f"deleted: {job.folder}")
        return True


class _Pool(ThreadPoolExecutor):
    """One thread, without work that waits when it is closed."""

    def __init__(self) -> None:
        super().__init__(1, "decode")

    def close(self) -> None:
        self.shutdown(cancel_futures=True)


def delete_job(folder: Path) -> None:
    """Deletes a job's folder, which the caller has claimed. Files of others stay, renamed away.

    It first gets a name that no process looks at, so that nobody claims it half deleted.
    """
    hidden = folder.with_name(f".deleted-{folder.name}")
    os.rename(folder, hidden)
    kept = delete_folder(hidden)
    if kept:
        print(f"warning: {printable(str(hidden))} holds files of others: {printable(kept[0])}")


def delete_leftovers(output_dir: Path) -> None:
    """Deletes what a killed process left of deleted jobs."""
    for folder in output_dir.glob(".deleted-*"):
        with contextlib.suppress(FileNotFoundError):  # another process deletes it
            delete_folder(folder)
        with contextlib.suppress(OSError):
            folder.rmdir()


def _until_canceled[State](
    folder: Path, states: Iterable[State], *, total: int, what: str, initial: int
) -> Iterator[State]:
    """Does what `show_steps` does, and stops when the job is canceled."""
    with contextlib.closing(
        show_steps(folder, states, total=total, what=what, initial=initial)
    ) as shown:
        for state in shown:
            yield state
            if (folder / CANCEL_FILE).exists():
                raise StoppedBetweenSteps
