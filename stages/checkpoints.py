"""Where and when stage 2 saves the state of its loop."""

import dataclasses
import os
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
    """

    folder: Path
    section: dict[str, Any]
    every: int | None
    stop: Callable[[], bool] = lambda: False

    @property
    def path(self) -> Path:
        """The file to write."""
        return self.folder / files.checkpoint_file(self.section)

    @property
    def source(self) -> Path:
        """The file to read; jobs of batches made by 0.1.0 have one without a run in its name."""
        return self.path if os.path.lexists(self.path) else self.folder / files.OLD_CHECKPOINT_FILE

    def remove(self) -> None:
        """Removes the checkpoint of this run."""
        for path in (self.path, self.folder / files.OLD_CHECKPOINT_FILE):
            path.unlink(missing_ok=True)

    def say_what_is_saved(self, steps: int, total: int) -> None:
        """Prints how an interrupted run goes on, if checkpoints are on."""
        if steps:
            print(f"saved {steps} of {total} steps in {self.path}; the same command resumes there")
        elif self.every:
            print(f"nothing is saved yet: --checkpoint_every {self.every} saves after that step")
