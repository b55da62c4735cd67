"""The table that `batch.py status` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from jobs.records import STAGES, JobState
from runtime.text import printable

_HEADINGS = ("job", "status", "stages", "size", "frames", "steps", "seed", "seconds", "what")
_WHAT_WIDTH = 80


def table(states: Sequence[JobState]) -> str:
    """Formats one line for each job and a last line with the number of jobs by status.

    Control characters in prompts, names and errors are escaped (`runtime.text.printable`).
    """
    rows = [_HEADINGS, *(_row(state) for state in states)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADINGS) - 1)]
    lines = ["  ".join([*map(str.ljust, row, widths), row[-1]]).rstrip() for row in rows]
    counts = Counter(state.status for state in states)
    summary = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    return "\n".join([*lines, f"{len(states)} job(s): {summary or 'none'}"])


def _row(state: JobState) -> tuple[str, ...]:
    settings, failure = state.job.settings, state.failure
    what = f"{failure.stage}: {failure.error}" if failure else " ".join(state.job.prompt.split())
    what = printable(what)
    cells = (
        state.folder.name,
        state.status,
        f"{state.stages_done}/{len(STAGES)}",
        f"{settings.height}x{settings.width}",
        f"{settings.num_frames}",
        f"{settings.num_inference_steps}",
        f"{settings.seed}",
        f"{state.seconds:.1f}" if state.seconds else "",
    )
    shown = what if len(what) <= _WHAT_WIDTH else what[: _WHAT_WIDTH - 1] + "…"
    return *map(printable, cells), shown
