"""Works on a folder's jobs on a Ray cluster: workers on every machine share one output folder.

Ray starts the workers and reports lost ones. The workers claim jobs as processes started by hand
do. The project, the model and the output folder must have the same paths on every machine.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.ledger import Counts, Ledger
from jobs.options import BatchOptions
from jobs.records import Job
from jobs.runner import Runner
from jobs.service import Service
from runtime.devices import insist_on
from runtime.errors import InputError, RunError

_POLL_SECONDS = 2.0
# Lost workers in a row, with no job finished between them, after which none is started again. When
# serving, the same number within this time.
_DEATHS = 3
_DEATHS_SECONDS = 60.0
_ROOT = Path(__file__).resolve().parents[1]

Slot = tuple[str, int]  # the Ray id of a machine, and a number of a worker on it


class _Worker:
    """A process on a machine of the cluster; its work and `stop` are called from two threads."""

    def __init__(self, folder: str) -> None:
        os.chdir(folder)  # the driver's, so that relative paths mean the same
        self._stop = threading.Event()

    def run(self, jobs: Sequence[Job], options: BatchOptions, rank: int) -> Counts:
        from cogvideox.model.folder import MODEL_PARTS, find_model

        options = prepare_machine(options)
        model = find_model(options.model_id, MODEL_PARTS)
        if model.revision != jobs[0].revision:
            raise RunError(
                f"{options.model_id} is {model.revision} here, {jobs[0].revision} on the driver"
            )
        runner = Runner(jobs, model, options, self._stop, rank)
        runner.check()
        return runner.run()

    def serve(self, options: BatchOptions) -> None:
        from cogvideox.model.folder import MODEL_PARTS, find_model

        options = prepare_machine(options)
        model = find_model(options.model_id, MODEL_PARTS)
        Service(model, options, self._stop, wake=threading.Event()).run()

    def stop(self) -> None:
        self._stop.set()


def prepare_machine(options: BatchOptions) -> BatchOptions:
    """Does on a worker's machine what a script does before a local run.

    Returns:
        The options with the worker's own copy of the executables.

    Raises:
        InputError: the machine has no such devices, or the executables have another digest.
        RunError: the copy cannot be written.
    """
    if options.platform:
        insist_on(options.platform)
    if not options.trust_executables:
        return options
    if not options.executables:
        raise InputError("--trust_executables is for --executables")
    from runtime.compilation import cache_folder
    from runtime.sharing import trusted_copy

    copies = trusted_copy(options.executables, options.trust_executables, cache_folder())
    return dataclasses.replace(options, executables=copies)


def connect() -> None:
    """Connects to the cluster of RAY_ADDRESS or of this machine, or starts one on this machine.

    Ray installs its own signal handlers in this call.
    """
    environment = {"env_vars": {"PYTHONPATH": str(_ROOT)}}
    # The workers' output, with all of libtpu's logs, stays in Ray's folder.
    ray.init(include_dashboard=False, log_to_driver=False, runtime_env=environment)


class _Team:
    """Workers on every machine of the cluster that do the same work."""

    def __init__(self, per_node: int, begin: Callable[[Any, int], ray.ObjectRef]):
        """
        Args:
            per_node: workers on each machine.
            begin: starts the work of a new worker with its rank, and returns the task.
        """
        self._per_node = per_node
        self._begin = begin
        self._workers: dict[Slot, tuple[Any, ray.ObjectRef]] = {}
        self._started = 0
        self._stopped = False

    def __len__(self) -> int:
        return len(self._workers)

    def fill(self) -> None:
        """Starts a worker on each free slot, also of machines that joined later."""
        nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        slots = {(node, i) for node in nodes for i in range(self._per_node)}
        for slot in slots - self._workers.keys():
            worker = self._start(slot[0], nodes[slot[0]])
            self._workers[slot] = worker, self._begin(worker, self._started)
            self._started += 1

    def stop(self) -> None:
        """Asks every worker to end."""
        if not self._stopped:
            self._stopped = True
            for worker, _ in self._workers.values():
                worker.stop.remote()

    def ended(self) -> Iterator[Any]:
        """Waits a little for workers to end; yields their results, and the error of a lost one.

        Raises:
            RunError: a worker failed.
        """
        refs = {ref: slot for slot, (_, ref) in self._workers.items()}
        for ref in ray.wait(list(refs), timeout=_POLL_SECONDS)[0]:
            worker, _ = self._workers.pop(refs[ref])
            try:
                result = ray.get(ref)
            except RayTaskError as error:
                raise RunError(f"a worker failed: {error.cause}") from error
            except RayError as error:
                print(f"warning: a worker was lost: {' '.join(str(error).split())[:200]}")
                yield error
            else:
                ray.kill(worker)
                yield result

    def _start(self, node: str, has: dict[str, float]) -> Any:
        """Starts a worker with its share of the machine's accelerators."""
        share = {name: has.get(name, 0) // self._per_node for name in ("TPU", "GPU")}
        return (
            ray.remote(_Worker)
            .options(
                max_concurrency=2,
                num_cpus=0,
                num_gpus=share["GPU"],
                resources={"TPU": share["TPU"]} if share["TPU"] else {},
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            )
            .remote(os.getcwd())
        )


def run(jobs: Sequence[Job], options: BatchOptions, stop: threading.Event) -> Counts:
    """Runs until no job is left or `stop` is set; replaces lost workers.

    Raises:
        RunError: a worker failed, or too many were lost in a row.
    """
    ledger = Ledger(options.output_dir, options.stages, options.retry_failed)
    team = _Team(
        options.workers_per_node,
        lambda worker, rank: worker.run.remote(list(jobs), options, rank),
    )
    deaths = 0
    counts = ledger.count(jobs)
    final: Counts | None = None
    while True:
        if not stop.is_set() and counts.left and deaths < _DEATHS and final is None:
            team.fill()
        if not team:
            break
        if stop.is_set():
            team.stop()
        before, counts = counts, ledger.count(jobs)
        if counts != before:
            print(f"[{counts.done} done, {counts.failed} failed, {counts.left} left]")
        for ended in team.ended():
            left, counts = counts.left, ledger.count(jobs)
            if isinstance(ended, RayError):
                deaths = deaths + 1 if counts.left == left else 1
            elif not ended.left:
                # It may count failures that could not be recorded.
                final = ended
    if final is not None:
        return final
    if counts.left and not stop.is_set():
        raise RunError(f"{deaths} workers were lost in a row; {counts.left} job(s) are left")
    return counts


def serve(options: BatchOptions, stop: threading.Event) -> None:
    """Works on jobs as they come until `stop` is set; replaces lost workers.

    Raises:
        RunError: a worker failed, or too many were lost in a short time.
    """
    team = _Team(options.workers_per_node, lambda worker, _: worker.serve.remote(options))
    deaths: list[float] = []
    print("Ray's workers wait for requests")
    while True:
        if not stop.is_set() and len(deaths) < _DEATHS:
            team.fill()
        if not team:
            break
        if stop.is_set():
            team.stop()
        for ended in team.ended():
            if isinstance(ended, RayError):
                now = time.monotonic()
                deaths = [*(death for death in deaths if now - death < _DEATHS_SECONDS), now]
    if not stop.is_set():
        raise RunError(f"{len(deaths)} workers were lost within {_DEATHS_SECONDS:.0f} s")
