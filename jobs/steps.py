"""How many steps of a running job are done: a bar for this terminal, a file for `status`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from runtime.errors import InputError
from runtime.files import write_json
from runtime.progress import printing_above_bar, progress
from runtime.typed_json import from_json, read_object

STEPS_FILE = "stage2_steps.json"
_EVERY_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Steps:
    """Denoising steps of a job that runs."""

    done: int
    total: int


def show_steps[State](
    folder: Path, states: Iterable[State], *, total: int, what: str, initial: int
) -> Iterator[State]:
    """Yields the states of a job's loop, one a step, and shows how many there were.

    Args:
        folder: of the job; STEPS_FILE in it is written once a second, and removed at the end.
        what: the work, such as "denoising".
        initial: steps that were done before.
    """
    bar = progress(states, total=total, what=f"{folder.name}: {what}", initial=initial, leave=False)
    path, due = folder / STEPS_FILE, time.monotonic()
    try:
        with printing_above_bar():
            for done, state in enumerate(bar, initial + 1):
                # Not into a folder that was removed meanwhile: writing would make it again.
                if time.monotonic() >= due and folder.is_dir():
                    write_json(path, dataclasses.asdict(Steps(done, total)))
                    due = time.monotonic() + _EVERY_SECONDS
                yield state
    finally:
        path.unlink(missing_ok=True)


def read_steps(folder: Path, report: Callable[[str], None]) -> Steps | None:
    """Reads how far a running job is; None if it is not denoising.

    Args:
        report: called with one line if the file is damaged.
    """
    path = folder / STEPS_FILE
    try:
        return from_json(Steps, read_object(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except InputError as error:
        report(f"ignoring {STEPS_FILE}: {error}")
    except ValueError as error:
        report(f"ignoring {path}: {error}")
    return None
