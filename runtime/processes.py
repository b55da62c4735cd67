"""Several processes that run one command together: start, agreement and end.

Each process drives the devices of its host; jax.distributed joins them. The first process reads and
writes the stage files. The others only compute.

Importing this module does not import JAX. Without `join` there is one process, the first.
"""

import contextlib
import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

# Signals are handled between two polls. The number of polls has no limit: JAX ends all processes if
# one is lost.
_LOOK_MILLISECONDS = 1000
# The files exist before they are requested; this allows for a slow network.
_SENT_MILLISECONDS = 600_000
_START_SECONDS = 300
# How long an ending process waits for the others. After success, `finish` waits without limit.
_SHUTDOWN_SECONDS = 10

_process, _processes = 0, 1
# Messages are numbered: all processes send and receive the same sequence.
_turns = itertools.count()
_copies: list[tempfile.TemporaryDirectory] = []  # removed when the process ends


class OtherProcessFailed(RuntimeError):
    """Another process has failed; the message says which, and why."""


def is_first() -> bool:
    """Returns whether this process reads and writes files and prints progress."""
    return _process == 0


def count() -> int:
    return _processes


def join() -> None:
    """Joins the processes that run this command, once.

    JAX finds them by itself on TPU slices and under Slurm, Open MPI and Kubernetes. Elsewhere
    JAX_COORDINATOR_ADDRESS (host:port of the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID
    name them. It must come before anything else touches a device.

    Raises:
        ValueError: the processes cannot be found.
    """
    global _process, _processes
    import jax

    own, count = _number("JAX_PROCESS_ID"), _number("JAX_NUM_PROCESSES")
    if own is not None and count is not None and own >= count:
        raise ValueError(f"JAX_PROCESS_ID={own} is not one of JAX_NUM_PROCESSES={count}, from 0 on")
    address = os.environ.get("JAX_COORDINATOR_ADDRESS", "host:1")
    if not re.fullmatch(r".+:\d+", address):
        raise ValueError(f"JAX_COORDINATOR_ADDRESS={address!r} is not host:port")
    print(f"waiting for the processes of this command, at most {_START_SECONDS} s", flush=True)
    # JAX would catch SIGTERM itself, only to note it, and the process would run on.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            num_processes=count,
            process_id=own,
            initialization_timeout=_START_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"--distributed: {error} Outside of TPU slices and clusters that JAX knows, set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error
    _process, _processes = _state().process_id, _state().num_processes


def exchange(text: str) -> list[str]:
    """Gathers `text` from all processes, in process order; each process waits for all.

    Raises:
        OtherProcessFailed: a process called `fail` instead.
    """
    if _processes == 1:
        return [text]
    turn = next(_turns)
    _client().key_value_set(_key(turn, _process), "+" + text)
    heard = []
    for process in range(_processes):
        answer = _wait_for(_key(turn, process))
        if answer.startswith("-"):
            raise OtherProcessFailed(f"process {process}: {answer[1:]}")
        heard.append(answer[1:])
    return heard


def check_alike(what: Mapping[str, object]) -> None:
    """Raises ValueError in every process unless all processes pass equal values."""
    first, *others = map(json.loads, exchange(json.dumps({k: str(v) for k, v in what.items()})))
    for process, other in enumerate(others, 1):
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"process {process} has {name} {other.get(name)}, process 0 has "
                    f"{first.get(name)}; start the same command in all"
                )


def folder_of_first(folder: Path, names: Iterable[str]) -> Path:
    """Returns the folder in the first process, and a copy of its named files in the others.

    So hosts need no shared disk. The copy is deleted when the process ends. Files that the first
    process does not have are not copied.
    """
    if _processes == 1:
        return folder
    present = [name for name in names if (folder / name).is_file()]
    turn = next(_turns)
    if is_first():
        for name in present:
            _client().key_value_set_bytes(_key(turn, name), (folder / name).read_bytes())
    present = json.loads(exchange(json.dumps(present))[0])
    if is_first():
        return folder
    _copies.append(tempfile.TemporaryDirectory(prefix="cogvideox-"))
    copy = Path(_copies[-1].name)
    for name in present:
        content = _client().blocking_key_value_get_bytes(_key(turn, name), _SENT_MILLISECONDS)
        (copy / name).write_bytes(content)
    return copy


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Runs its body as a single process, without the others."""
    global _processes
    processes, _processes = _processes, 1
    try:
        yield
    finally:
        _processes = processes


def finish() -> None:
    """Waits until every process has finished its work.

    Raises:
        OtherProcessFailed: a process has failed.
    """
    exchange("done")


def fail(reason: str) -> None:
    """Reports failure of this process to the others; they read it when they next wait for it.

    JAX ends processes that wait for its devices, seconds after this process ends.
    """
    if _processes > 1:
        _client().key_value_set(_key(next(_turns), _process), "-" + reason)


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is not None and not text.isdecimal():
        raise ValueError(f"{variable}={text!r} is not a number")
    return None if text is None else int(text)


def _wait_for(key: str) -> str:
    """Waits until a process has set a key; returns its value."""
    from jax.errors import JaxRuntimeError

    while True:
        try:
            return _client().blocking_key_value_get(key, _LOOK_MILLISECONDS)
        except JaxRuntimeError as error:
            if not str(error).startswith("DEADLINE_EXCEEDED"):
                raise


def _key(turn: int, what: object) -> str:
    return f"cogvideox/{turn}/{what}"


def _state() -> Any:
    # JAX has no public API for the key-value store of the processes.
    from jax._src import distributed

    return distributed.global_state


def _client() -> Any:
    return _state().client
