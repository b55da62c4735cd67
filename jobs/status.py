"""The table that `batch.py status` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from jobs.records import STAGES, JobState
from jobs.steps import planned_steps
from runtime.text import printable

_HEADINGS = ("job", "status", "stages", "size", "frames", "steps", "seed", "seconds", "what")
_WHAT_WIDTH = 80


def table(states: Sequence[JobState], superseded: Collection[str] = ()) -> str:
    """Formats one line for each job and a last line with the number of jobs by status.

    Control characters in prompts, names and errors are escaped (`runtime.text.printable`).

    Args:
        states: the jobs, from `jobs.records.read_batch`.
        superseded: ids from `jobs.superseded.find_superseded`.
    """
    statuses = [
        "superseded" if state.job.id in superseded and state.status != "running" else state.status
        for state in states
    ]
    rows = [_HEADINGS, *map(_row, states, statuses)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADINGS) - 1)]
    lines = ["  ".join([*map(str.ljust, row, widths), row[-1]]).rstrip() for row in rows]
    counts = Counter(statuses)
    summary = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    return "\n".join([*lines, f"{len(states)} job(s): {summary or 'none'}"])


def _row(state: JobState, status: str) -> tuple[str, ...]:
    settings, failure = state.job.settings, state.failure
    what = f"{failure.stage}: {failure.error}" if failure else " ".join(state.job.prompt.split())
    what = printable(f"{state.steps.what}: {what}" if state.steps else what)
    cells = (
        state.folder.name,
        status,
        f"{state.stages_done}/{len(STAGES)}",
        f"{settings.height}x{settings.width}",
        f"{settings.num_frames}",
        f"{state.steps.done}/{state.steps.total}"
        if state.steps and state.steps.total
        else planned_steps(settings),
        f"{settings.seed}",
        f"{state.seconds:.1f}" if state.seconds else "",
    )
    shown = what if len(what) <= _WHAT_WIDTH else what[: _WHAT_WIDTH - 1] + "…"
    return *map(printable, cells), shown
