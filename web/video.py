"""A job as the API sees it."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jobs.records import Job, JobState

Status = Literal["queued", "in_progress", "completed", "failed"]


@dataclasses.dataclass(frozen=True)
class Video:
    """A job as it was when it was read.

    Attributes:
        preview: changes with the preview; None if there is none.
        position: in the queue, from 1; None if it is not queued.
        seconds_left: until it is done; None if nothing is known.
    """

    state: JobState
    created: float
    completed: float | None
    preview: int | None = None
    position: int | None = None
    seconds_left: float | None = None

    @property
    def id(self) -> str:
        return video_id(self.state.job)

    @property
    def status(self) -> Status:
        kinds: dict[str, Status] = {
            "done": "completed", "failed": "failed", "running": "in_progress"
        }  # fmt: skip
        return kinds.get(self.state.status, "queued")

    @property
    def ended(self) -> bool:
        return self.status in ("completed", "failed")


def video_id(job: Job) -> str:
    return f"video_{job.id}"
