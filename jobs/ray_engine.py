"""Runs a batch on a Ray cluster: workers on every machine share one output folder.

Ray starts the workers and reports lost ones. The workers claim jobs as processes started by hand
do. The project, the model and the output folder must have the same paths on every machine.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.ledger import Counts, Ledger
from jobs.options import BatchOptions
from jobs.records import Job
from jobs.runner import Runner
from runtime.devices import insist_on
from runtime.errors import InputError, RunError

_POLL_SECONDS = 2.0
# Lost workers in a row, with no job finished between them, after which none is started again.
_DEATHS = 3
_ROOT = Path(__file__).resolve().parents[1]

Slot = tuple[str, int]  # the Ray id of a machine, and a number of a worker on it


class _Worker:
    """A process on a machine of the cluster; `run` and `stop` are called from two threads."""

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


def run(jobs: Sequence[Job], options: BatchOptions, stop: threading.Event) -> Counts:
    """Runs until no job is left or `stop` is set; replaces lost workers.

    Raises:
        RunError: a worker failed, or too many were lost in a row.
    """
    ledger = Ledger(options.output_dir, options.stages, options.retry_failed)
    workers: dict[Slot, tuple[Any, ray.ObjectRef]] = {}
    deaths, started, stopped = 0, 0, False
    counts = ledger.count(jobs)
    final: Counts | None = None
    while True:
        if not stop.is_set() and counts.left and deaths < _DEATHS and final is None:
            for slot in _slots(options.workers_per_node) - workers.keys():
                workers[slot] = _start(slot, jobs, options, started)
                started += 1
        if not workers:
            break
        if stop.is_set() and not stopped:
            stopped = True
            for worker, _ in workers.values():
                worker.stop.remote()
        before, counts = counts, ledger.count(jobs)
        if counts != before:
            print(f"[{counts.done} done, {counts.failed} failed, {counts.left} left]")
        refs = {ref: slot for slot, (_, ref) in workers.items()}
        for ref in ray.wait(list(refs), timeout=_POLL_SECONDS)[0]:
            worker, _ = workers.pop(refs[ref])
            left, counts = counts.left, ledger.count(jobs)
            try:
                ended = ray.get(ref)
                if not ended.left:
                    # It may count failures that could not be recorded.
                    final = ended
            except RayTaskError as error:
                raise RunError(f"a worker failed: {error.cause}") from error
            except RayError as error:
                deaths = deaths + 1 if counts.left == left else 1
                print(f"warning: a worker was lost: {' '.join(str(error).split())[:200]}")
            else:
                ray.kill(worker)
    if final is not None:
        return final
    if counts.left and not stop.is_set():
        raise RunError(f"{deaths} workers were lost in a row; {counts.left} job(s) are left")
    return counts


def _slots(per_node: int) -> set[Slot]:
    """The slots of all machines that are alive now, also of those that joined later."""
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    return {(node, i) for node in nodes for i in range(per_node)}


def _start(
    slot: Slot, jobs: Sequence[Job], options: BatchOptions, rank: int
) -> tuple[Any, ray.ObjectRef]:
    """Starts a worker with its share of the machine's accelerators; returns it and its task."""
    node, _ = slot
    has = next(n["Resources"] for n in ray.nodes() if n["NodeID"] == node)
    share = {name: has.get(name, 0) // options.workers_per_node for name in ("TPU", "GPU")}
    worker = (
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
    return worker, worker.run.remote(list(jobs), options, rank)
