"""Where and when stage 2 saves the state of its loop."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages import files


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Where and when to save the state of the loop, from which a killed run resumes.

    Attributes:
        section: of this run in generation_config.json; checkpoints of other runs are ignored.
        every: steps between two saves; None neither saves nor reads a checkpoint.
        stop: called after each step; if it returns True, the loop saves its state and ends.
        name: of the file; a folder that only one run uses, as that of a job, needs no other.
    """

    folder: Path
    section: dict[str, Any]
    every: int | None
    stop: Callable[[], bool] = lambda: False
    name: str = files.CHECKPOINT_FILE

    @property
    def path(self) -> Path:
        return self.folder / self.name

    def say_what_is_saved(self, steps: int, total: int) -> None:
        """Prints how an interrupted run goes on, if checkpoints are on."""
        if steps:
            print(f"saved {steps} of {total} steps in {self.path}; the same command resumes there")
        elif self.every:
            print(f"nothing is saved yet: --checkpoint_every {self.every} saves after that step")
