"""`index.html` of a batch: every job with its video, settings, timings, and errors.

The page is one static file beside the jobs' folders and needs no network. Prompts, names and errors
are other people's text: the templates escape everything, and the page's content security policy
forbids all scripts and styles but its own.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cogvideox.model.settings import DenoisingSettings
from jobs.records import (
    CONTACT_SHEET_FILE,
    STAGES,
    JobState,
    JobStatus,
    read_batch,
    warn,
)
from jobs.steps import Steps, planned_steps
from jobs.superseded import find_superseded
from runtime.errors import InputError
from runtime.files import atomic_path
from stages import files as stage_files
from stages.preview import PREVIEW_FILE

GALLERY_FILE = "index.html"
CardStatus = JobStatus | Literal["superseded"]
_STATUSES: tuple[CardStatus, ...] = (*get_args(JobStatus), "superseded")
# While jobs have these statuses, the open page reloads itself.
_UNFINISHED = ("pending", "running")
_REFRESH_SECONDS = 20
_TEMPLATES = Path(__file__).parent / "templates"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclasses.dataclass(frozen=True)
class Picture:
    """A finished video and its contact sheet."""

    video: str  # URL relative to the batch's folder
    sheet: str  # URL relative to the batch's folder
    sheet_size: tuple[int, int] | None  # width, height in pixels; None for a damaged file
    width: int  # of the video, in pixels
    height: int


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a job is."""

    what: str  # one line
    done: int
    total: int


@dataclasses.dataclass(frozen=True)
class Card:
    """What the gallery shows of a job; the template escapes every field."""

    status: CardStatus
    name: str
    prompt: str
    note: str | None
    error: str | None  # stage and error of a failed job, one line
    traceback: str | None
    settings: str  # one line
    facts: tuple[tuple[str, str], ...]  # name and value
    links: tuple[tuple[str, str], ...]  # label and URL
    picture: Picture | None
    progress: Progress | None = None
    preview: str | None = None  # URL of a small animated picture of a running job
    video_id: str | None = None  # of the server's API; the page's buttons need it
    state: str | None = None  # the status by the server's API
    input: str | None = None  # URL of the image that the video starts from


UrlOf = Callable[[Path], str]  # of a file in a job's folder


def write_gallery(output_dir: Path, states: Sequence[JobState]) -> Path:
    """Writes the gallery of a batch's folder, atomically.

    Args:
        output_dir: the batch's folder.
        states: the jobs, from `jobs.records.read_batch`.

    Returns:
        The path of the page.

    Raises:
        OSError: the folder cannot be written.
        InputError: the folder's `batch.json` is damaged.
    """
    path = output_dir / GALLERY_FILE
    html = page(output_dir.resolve().name, states, find_superseded(output_dir, states))
    with atomic_path(path) as temporary:
        # JSON strings may hold lone surrogates, which UTF-8 cannot encode.
        temporary.write_text(html, "utf-8", errors="replace")
    return path


class Gallery:
    """Keeps the gallery of a batch's folder up to date. Any thread may call `update`."""

    def __init__(self, output_dir: Path):
        self._output_dir = output_dir
        self._lock = threading.Lock()
        self._due = 0.0
        self._warned: set[str] = set()
        self._later: threading.Timer | None = None

    def update(self, *, now: bool = False) -> None:
        """Writes the gallery, at once or a little later.

        Writing takes at most a twentieth of the time: a call that comes too early starts a timer
        that writes when the time has come.

        Args:
            now: write at once, and stop the timer.
        """
        with self._lock:
            wait = self._due - time.monotonic()
            if not now and wait > 0:
                if self._later is None:
                    self._later = threading.Timer(wait, self._update_late)
                    self._later.daemon = True
                    self._later.start()
                return
            if self._later is not None:
                self._later.cancel()
                self._later = None
            self._write()

    def _update_late(self) -> None:
        with self._lock:
            if self._later is threading.current_thread():  # not canceled in the meantime
                self._later = None
                self._write()

    def _write(self) -> None:
        start = time.monotonic()
        try:
            write_gallery(self._output_dir, read_batch(self._output_dir, self._warn_once))
        except (OSError, InputError) as error:
            # The videos matter more than the gallery; the next update tries again.
            warn(f"{GALLERY_FILE} was not updated: {error}")
        self._due = start + 20 * (time.monotonic() - start)

    def _warn_once(self, problem: str) -> None:
        if problem not in self._warned:
            self._warned.add(problem)
            warn(problem)


def page(title: str, states: Sequence[JobState], superseded: Collection[str] = ()) -> str:
    """Renders the gallery as HTML, with links relative to the batch's folder.

    Args:
        title: the page's heading.
        states: the jobs in the order to show.
        superseded: ids of the jobs that the job file no longer asks for.
    """
    template = make_environment().get_template("gallery.html")
    return template.render(template_values(title, states, superseded))


def template_values(
    title: str, states: Sequence[JobState], superseded: Collection[str] = ()
) -> dict[str, object]:
    """Returns what `gallery.html` and templates that extend it need; arguments as of `page`."""
    return values_of_cards(title, [make_card(s, s.job.id in superseded) for s in states], states)


def values_of_cards(
    title: str, cards: Sequence[Card], states: Sequence[JobState]
) -> dict[str, object]:
    """Does what `template_values` does, with cards that are made already."""
    counts: Counter[CardStatus] = Counter(card.status for card in cards)
    choices = [("", "all", len(cards))]
    choices += [(status, status, counts[status]) for status in _STATUSES if counts[status]]
    # The page's own style and script are the only text that is not escaped.
    style, script = (
        Markup((_TEMPLATES / name).read_text("utf-8")) for name in ("gallery.css", "gallery.js")
    )
    return {
        "title": title,
        "summary": _summary(states, counts),
        "choices": choices,
        "cards": cards,
        "refresh_seconds": _REFRESH_SECONDS if any(counts[s] for s in _UNFINISHED) else 0,
        "style": style,
        "script": script,
    }


@cache
def make_environment(*folders: Path) -> Environment:
    """Returns the templates of `jobs/templates`, after those in other `folders`."""
    environment = Environment(
        loader=FileSystemLoader([*folders, _TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["csp_hash"] = _csp_hash
    return environment


def make_card(state: JobState, superseded: bool, url_of: UrlOf | None = None) -> Card:
    """Collects what the gallery shows of a job.

    Args:
        state: the job.
        superseded: whether the job file no longer asks for it.
        url_of: None makes URLs relative to the batch's folder.
    """
    job, failure, url_of = state.job, state.failure, url_of or _url
    preview, steps = state.folder / PREVIEW_FILE, state.steps
    files = {
        "video": stage_files.VIDEO_FILE,
        "contact sheet": CONTACT_SHEET_FILE,
        "settings": stage_files.CONFIG_FILE,
    }
    paths = {label: state.folder / name for label, name in files.items()}
    input_file = state.folder / stage_files.INPUT_FILE
    shown_superseded = superseded and state.status != "running"
    return Card(
        status="superseded" if shown_superseded else state.status,
        name=job.name,
        prompt=job.prompt,
        note=f"Its line of the job file has changed; this one was {state.status}."
        if shown_superseded
        else None,
        error=f"{failure.stage}: {failure.error}" if failure else None,
        traceback=failure.traceback if failure else None,
        settings=_describe(job.settings),
        facts=tuple(_facts(state)),
        links=tuple((label, url_of(path)) for label, path in paths.items() if path.is_file()),
        picture=_picture(state, url_of),
        progress=Progress(describe_steps(steps), steps.done, max(steps.total, 1))
        if steps
        else None,
        preview=url_of(preview) if state.status == "running" and preview.is_file() else None,
        input=url_of(input_file) if job.input and input_file.is_file() else None,
    )


def describe_steps(steps: Steps) -> str:
    """What a running job does, for people."""
    return f"{steps.what}: step {steps.done} of {steps.total}" if steps.total else steps.what


def _csp_hash(text: str) -> str:
    """The source expression by which a policy allows an inline style or script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _summary(states: Sequence[JobState], counts: Counter[CardStatus]) -> list[str]:
    seconds = [state.seconds for state in states if state.status == "done"]
    parts = [f"{counts['done']} of {len(states) - counts['superseded']} videos"]
    if seconds:
        parts.append(f"{_duration(sum(seconds) / len(seconds))} each on average")
    parts.append(f"written {time.strftime('%Y-%m-%d %H:%M:%S')}")
    return parts


def _picture(state: JobState, url_of: UrlOf) -> Picture | None:
    settings = state.job.settings
    sheet, video = state.folder / CONTACT_SHEET_FILE, state.folder / stage_files.VIDEO_FILE
    if not (sheet.is_file() and video.is_file()):
        return None
    size = _png_size(sheet)
    return Picture(url_of(video), url_of(sheet), size, settings.width, settings.height)


def _describe(settings: DenoisingSettings) -> str:
    """The settings in one line.

    `DenoisingSettings.describe` formats numbers; a foreign job.json may hold strings instead.
    """
    dynamic = " dynamic" if settings.use_dynamic_cfg else ""
    return (
        f"{settings.width}x{settings.height}, {settings.num_frames} frames at "
        f"{settings.fps} fps, {planned_steps(settings)} {settings.scheduler} steps,"
        f"{dynamic} guidance {_number(settings.guidance_scale)}, seed {settings.seed}"
    )


def _facts(state: JobState) -> Iterator[tuple[str, str]]:
    job, settings = state.job, state.job.settings
    yield "seed", str(settings.seed)
    yield "size", f"{settings.width} × {settings.height}"
    yield "frames", f"{settings.num_frames} at {settings.fps} a second"
    dynamic = ", dynamic" if settings.use_dynamic_cfg else ""
    yield "guidance", f"{_number(settings.guidance_scale)}{dynamic}"
    yield "steps", f"{planned_steps(settings)} {settings.scheduler}"
    if job.lossy.names:
        yield "lossy", "; ".join(job.lossy.names)
    if job.loras:
        yield "LoRA", ", ".join(choice.shown for choice in job.loras)
    if job.input:
        yield job.input.kind, f"{Path(job.input.path).name}, {job.input.image_fit}"
    if job.input and job.input.kind == "video":
        yield "strength", _number(settings.strength)
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
        yield "total", _duration(state.seconds)


def _url(path: Path) -> str:
    """The URL of a job's file, relative to the batch's folder."""
    return f"./{quote(path.parent.name, safe='')}/{quote(path.name, safe='')}"


def _png_size(path: Path) -> tuple[int, int] | None:
    """Width and height; they keep a picture's place until it is loaded."""
    with open(path, "rb") as file:
        start = file.read(24)
    if len(start) < 24 or not start.startswith(_PNG_SIGNATURE):
        return None
    return int.from_bytes(start[16:20], "big"), int.from_bytes(start[20:24], "big")


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _duration(seconds: float) -> str:
    if seconds < 100 or not math.isfinite(seconds):
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
