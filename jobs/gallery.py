"""`index.html` of a batch: every job with its video, settings and timings, or why there is none.

One static file beside the jobs' folders, that needs nothing else and no network. Prompts, names and
errors are other people's text: all of it is escaped, and the page's own policy forbids every
script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import get_args
from urllib.parse import quote

from jobs.records import (
    CONTACT_SHEET_FILE,
    STAGES,
    JobState,
    JobStatus,
    StageRecord,
    read_batch,
)
from runtime.errors import InputError
from runtime.files import atomic_path
from stages import files as stage_files

GALLERY_FILE = "index.html"
_PARTS = Path(__file__).parent
_PNG_START = b"\x89PNG\r\n\x1a\n"


def write_gallery(output_dir: Path, states: Sequence[JobState]) -> Path:
    """Writes the gallery of a batch's folder, atomically.

    Args:
        states: as `jobs.records.read_batch` gives them.

    Raises:
        OSError: the folder cannot be written.
    """
    path = output_dir / GALLERY_FILE
    with atomic_path(path) as temporary:
        # A job file may hold halves of surrogate pairs, which no encoding takes.
        temporary.write_text(page(output_dir.resolve().name, states), "utf-8", errors="replace")
    return path


class Gallery:
    """Keeps the gallery of a batch's folder up to date while jobs end, in any thread."""

    def __init__(self, output_dir: Path):
        self._output_dir = output_dir
        self._lock = threading.Lock()
        self._due = 0.0

    def update(self, *, now: bool = False) -> None:
        """Writes it if the last time is long enough ago that it takes a twentieth of the time.

        Args:
            now: write it however long that is.
        """
        with self._lock:
            start = time.monotonic()
            if not now and start < self._due:
                return
            try:
                write_gallery(self._output_dir, read_batch(self._output_dir))
            except (OSError, InputError) as error:
                # A gallery is not worth the night's work; the next job's end tries again.
                print(f"warning: no new {GALLERY_FILE}: {error}")
            self._due = start + 20 * (time.monotonic() - start)


def page(title: str, states: Sequence[JobState]) -> str:
    """The gallery as HTML, with links relative to the batch's folder."""
    style, script = ((_PARTS / f"gallery.{kind}").read_text("utf-8") for kind in ("css", "js"))
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; img-src 'self' file: data:; "
        f"media-src 'self' file:; style-src {_hash(style)}; script-src {_hash(script)}"
    )
    counts = Counter(state.status for state in states)
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(title)}</title>",
            # Without an icon of its own a page served by a web server asks for one.
            '<link rel="icon" href="data:,">',
            f"<style>{style}</style>",
            "<header>",
            f"<h1>{escape(title)}</h1>",
            f"<p>{_summary(states)}</p>",
            '<search><input type="search" placeholder="Filter by prompt, name, seed, error …" '
            'aria-label="Filter by text" autocomplete="off">',
            _status_buttons(counts, len(states)),
            '<output aria-live="polite"></output></search>',
            "</header>",
            "<main>",
            *(_card(state) for state in states),
            '<p class="none" hidden>No job matches.</p>',
            "</main>",
            f"<script>{script}</script>",
            "</html>\n",
        ]
    )


def _hash(text: str) -> str:
    """What a page's policy calls an inline style or script that it allows."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _summary(states: Sequence[JobState]) -> str:
    done = [state for state in states if state.status == "done"]
    parts = [f"{len(done)} of {len(states)} videos"]
    if done:
        parts.append(f"{_duration(sum(s.seconds for s in done) / len(done))} each on average")
    parts.append(f"written {time.strftime('%Y-%m-%d %H:%M:%S')}")
    return escape(" · ".join(parts))


def _status_buttons(counts: Counter[JobStatus], total: int) -> str:
    choices = [("", "all", total)]
    choices += [(s, s, counts[s]) for s in get_args(JobStatus) if counts[s]]
    buttons = (
        f'<button type="button" data-status="{status}" aria-pressed="{str(not status).lower()}">'
        f"{label} <b>{count}</b></button>"
        for status, label, count in choices
    )
    return f'<div role="group" aria-label="Filter by status">{"".join(buttons)}</div>'


def _card(state: JobState) -> str:
    job = state.job
    return "\n".join(
        [
            f'<article data-status="{state.status}">',
            _picture(state),
            f'<h2><span class="status">{state.status}</span> <bdi>{escape(job.name)}</bdi></h2>',
            f'<p class="prompt" dir="auto">{escape(job.prompt)}</p>',
            *_failure(state.failure),
            f"<p>{escape(job.settings.describe())}</p>",
            "<details><summary>Settings, timings, files</summary><dl>",
            *(f"<dt>{escape(k)}</dt><dd><bdi>{escape(v)}</bdi></dd>" for k, v in _facts(state)),
            "</dl>",
            _links(state),
            "</details>",
            "</article>",
        ]
    )


def _picture(state: JobState) -> str:
    """The contact sheet, which the page's script turns into a player; without it, a link."""
    settings = state.job.settings
    sheet, video = state.folder / CONTACT_SHEET_FILE, state.folder / stage_files.VIDEO_FILE
    if not (sheet.is_file() and video.is_file()):
        return ""
    return (
        f'<a class="play" href="{_link(video)}" data-width="{settings.width}" '
        f'data-height="{settings.height}"><img loading="lazy" decoding="async" '
        f'src="{_link(sheet)}" {_png_size(sheet)} '
        f'alt="Frames of {escape(state.job.name)}"><span>Play</span></a>'
    )


def _failure(record: StageRecord | None) -> Iterator[str]:
    if record is None:
        return
    yield f'<p class="error" dir="auto">{escape(f"{record.stage}: {record.error}")}</p>'
    if record.traceback:
        trace = escape(record.traceback)
        yield f"<details><summary>Traceback</summary><pre>{trace}</pre></details>"


def _facts(state: JobState) -> Iterator[tuple[str, str]]:
    job, settings = state.job, state.job.settings
    yield "seed", str(settings.seed)
    yield "size", f"{settings.width} × {settings.height}"
    yield "frames", f"{settings.num_frames} at {settings.fps} a second"
    dynamic = ", dynamic" if settings.use_dynamic_cfg else ""
    yield "guidance", f"{settings.guidance_scale:g}{dynamic}"
    yield "steps", f"{settings.num_inference_steps} {settings.scheduler}"
    if job.negative_prompt:
        yield "negative prompt", job.negative_prompt
    yield "model", job.model_id + (f" @ {job.revision[:12]}" if job.revision else "")
    yield "precision", f"{job.dtype}, decoder {job.decoder}"
    yield "line", str(job.line)
    for stage in STAGES:
        if stage in state.records:
            record = state.records[stage]
            again = f", attempt {record.attempt}" if record.attempt > 1 else ""
            took = f"{_duration(record.seconds)}, " if record.status == "done" else ""
            # "stage1_text_encoder" is shown as "text encoder".
            part = stage.partition("_")[2].replace("_", " ")
            yield part, f"{record.status}, {took}by {record.worker}{again}"
    if state.seconds:
        yield "in all", _duration(state.seconds)


def _links(state: JobState) -> str:
    files = {
        "video": stage_files.VIDEO_FILE,
        "contact sheet": CONTACT_SHEET_FILE,
        "settings": stage_files.CONFIG_FILE,
    }
    links = [
        f'<a href="{_link(state.folder / file)}">{label}</a>'
        for label, file in files.items()
        if (state.folder / file).is_file()
    ]
    return f"<p>{' · '.join(links)}</p>"


def _link(path: Path) -> str:
    """A URL relative to the batch's folder; quoted, it needs no escaping."""
    return f"./{quote(path.parent.name, safe='')}/{quote(path.name, safe='')}"


def _png_size(path: Path) -> str:
    """The attributes that keep a picture's place until it is loaded; none for a damaged file."""
    with open(path, "rb") as file:
        start = file.read(24)
    if len(start) < 24 or not start.startswith(_PNG_START):
        return ""
    width, height = (int.from_bytes(start[i : i + 4]) for i in (16, 20))
    return f'width="{width}" height="{height}"'


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
