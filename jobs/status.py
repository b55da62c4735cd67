"""A batch's folder as a table for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from jobs.records import STAGES, JobState

_HEADINGS = ("job", "status", "stages", "size", "frames", "steps", "seed", "seconds", "what")


def table(states: Sequence[JobState]) -> str:
    """One line a job, and the counts by status."""
    rows = [_HEADINGS, *(_row(state) for state in states)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADINGS) - 1)]
    lines = ["  ".join([*map(str.ljust, row, widths), row[-1]]).rstrip() for row in rows]
    counts = Counter(state.status for state in states)
    summary = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    return "\n".join([*lines, f"{len(states)} job(s): {summary or 'none'}"])


def _row(state: JobState) -> tuple[str, ...]:
    settings, failure = state.job.settings, state.failure
    what = f"{failure.stage}: {failure.error}" if failure else " ".join(state.job.prompt.split())
    return (
        state.folder.name,
        state.status,
        f"{state.stages_done}/{len(STAGES)}",
        f"{settings.height}x{settings.width}",
        str(settings.num_frames),
        str(settings.num_inference_steps),
        str(settings.seed),
        f"{state.seconds:.1f}" if state.seconds else "",
        what if len(what) <= 80 else what[:79] + "…",
    )
