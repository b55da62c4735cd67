"""The process that makes a server's videos: started, woken, watched and started again.

JAX in a process of its own leaves the server's threads free to answer, and a crash of a driver ends
no connection. The worker ends when this process does, even by SIGKILL: its stdin closes.
"""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from jobs.records import (
    STAGES,
    JobState,
    StageRecord,
    read_batch,
    worker_name,
    write_record,
)
from runtime.errors import InputError

# Deaths in a row while the same job was in work, after which the job counts as the reason.
_MOST_DEATHS = 3
_WAITS = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)  # seconds before the next start
_HEALTHY_SECONDS = 60.0
_STOP_SECONDS = 600.0

State = Literal["starting", "running", "waiting", "stopped"]


class Worker:
    """Keeps one worker process running. Use it in a `with`."""

    def __init__(self, command: Sequence[str], output_dir: Path, failed: Callable[[str], None]):
        """
        Args:
            command: starts the worker; a line on its stdin says that a job has come.
            output_dir: holds the jobs.
            failed: called with the folder's name of a job that failed because it ends workers.
        """
        self._command, self._output_dir, self._failed = command, output_dir, failed
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._deaths: Counter[str] = Counter()  # by the folder of the job in work
        self.starts = 0

    def __enter__(self) -> Worker:
        self._keeper.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        with self._lock:
            process = self._process
        if process and process.poll() is None:
            print("stopping: the worker ends or saves the running step")
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        self._keeper.join()

    @property
    def state(self) -> State:
        if self._stopping.is_set():
            return "stopped"
        with self._lock:
            if self._process is None:
                return "waiting" if self.starts else "starting"
            return "running" if self._process.poll() is None else "waiting"

    def wake(self) -> None:
        """Tells the worker that there is something to do; it would look in two seconds."""
        with self._lock:
            if self._process is None or self._process.stdin is None:
                return
            try:
                self._process.stdin.write("\n")
                self._process.stdin.flush()
            except (BrokenPipeError, ValueError):  # it has just ended; the next one looks first
                pass

    def _keep(self) -> None:
        in_a_row = 0
        while not self._stopping.is_set():
            start = time.monotonic()
            process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, text=True, start_new_session=True
            )
            with self._lock:
                self._process = process
                self.starts += 1
            if self._stopping.is_set():
                process.send_signal(signal.SIGTERM)
            code = process.wait()
            if self._stopping.is_set():
                return
            in_a_row = 0 if time.monotonic() - start > _HEALTHY_SECONDS else in_a_row + 1
            wait = _WAITS[min(in_a_row, len(_WAITS) - 1)]
            print(f"warning: the worker ended with {_name(code)}; starting it again in {wait:g} s")
            self._blame()
            self._stopping.wait(wait)

    def _blame(self) -> None:
        """Counts a death; fails the job that was in work at each of the last few."""
        try:
            states = read_batch(self._output_dir, lambda problem: None)
        except InputError as error:
            print(f"warning: {error}")
            return
        killed = {state.folder.name: state for state in states if state.status == "interrupted"}
        for name in self._deaths.keys() - killed.keys():
            del self._deaths[name]
        self._deaths.update(killed.keys())
        for name, state in killed.items():
            if self._deaths[name] >= _MOST_DEATHS:
                write_record(state.folder, _failure(state))
                self._failed(name)


def _failure(state: JobState) -> StageRecord:
    stage = next((s for s in STAGES if s not in state.records), STAGES[-1])
    stage = next((s for s, r in state.records.items() if r.status != "done"), stage)
    error = f"the worker ended {_MOST_DEATHS} times while it made this video"
    return StageRecord(stage, "failed", _MOST_DEATHS, worker_name(), time.time(), error=error)


def _name(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
