"""What a running job does and how far it is: a bar for this terminal, a file for others."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import InputError
from runtime.files import write_json
from runtime.progress import printing_above_bar, progress
from runtime.typed_json import from_json, read_object

if TYPE_CHECKING:
    from cogvideox.model.settings import DenoisingSettings

STEPS_FILE = "progress.json"
_EVERY_SECONDS = 0.25


@dataclasses.dataclass(frozen=True)
class Steps:
    """What a running job does, and how many of its denoising steps are done.

    Attributes:
        what: the activity, such as "denoising" or "loading the transformer".
        initial: steps that were done before this process began.
        since: when it began to denoise, seconds since 1970; 0 before.
    """

    done: int
    total: int
    what: str = "denoising"
    initial: int = 0
    since: float = 0.0

    def seconds_left(self, now: float) -> float | None:
        """Seconds that the other steps will take, at the pace so far; None if it is unknown."""
        made = self.done - self.initial
        if made <= 0 or not self.since:
            return None
        return max(now - self.since, 0.0) / made * (self.total - self.done)


def planned_steps(settings: DenoisingSettings) -> str:
    """`DenoisingSettings.shown_steps`, if values of a foreign job.json are of the right types."""
    steps, strength = settings.num_inference_steps, settings.strength
    right = type(steps) is int and type(strength) is float and 0 <= strength <= 1
    return settings.shown_steps if right else str(steps)


def show_steps[State](
    folder: Path, states: Iterable[State], *, total: int, what: str, initial: int
) -> Generator[State]:
    """Yields the states of a job's loop, one a step, and shows how many there were.

    Args:
        folder: of the job; STEPS_FILE in it is written four times a second, and removed at the end.
        what: the work, such as "denoising".
        initial: steps that were done before.
    """
    bar = progress(states, total=total, what=f"{folder.name}: {what}", initial=initial, leave=False)
    path, due, since = folder / STEPS_FILE, time.monotonic() + _EVERY_SECONDS, time.time()
    _write(folder, Steps(initial, total, what, initial, since))
    try:
        with printing_above_bar():
            for done, state in enumerate(bar, initial + 1):
                if time.monotonic() >= due:
                    _write(folder, Steps(done, total, what, initial, since))
                    due = time.monotonic() + _EVERY_SECONDS
                yield state
    finally:
        path.unlink(missing_ok=True)


def show_activity(folder: Path, what: str) -> None:
    """Writes what is about to be done for a job, before it is denoised or after."""
    _write(folder, Steps(0, 0, what))


def _write(folder: Path, steps: Steps) -> None:
    # Not into a folder that was removed meanwhile: writing would make it again.
    if folder.is_dir():
        write_json(folder / STEPS_FILE, dataclasses.asdict(steps), durable=False)


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
