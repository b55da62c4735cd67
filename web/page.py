"""The page at `/`: the gallery's template with a form, and cards of single videos."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment
from markupsafe import Markup

from jobs.gallery import Card, Progress, make_card, make_environment, values_of_cards
from jobs.records import CONTACT_SHEET_FILE
from stages import files
from stages.preview import PREVIEW_FILE
from web.describe import describe_progress
from web.store import Store
from web.video import Video

_TEMPLATES = Path(__file__).parent / "templates"
_MAX_CARDS = 500
_STATUSES = ("done", "running", "pending", "interrupted", "failed")
_EXAMPLES = {"toyworld": "a red circle moves left on a dark blue background"}
_EXAMPLE = "A panda plays guitar in a bamboo forest"


def page(store: Store, videos: Sequence[Video]) -> str:
    """Renders the page, the newest videos first."""
    shown = [video for video in reversed(videos)][:_MAX_CARDS]
    cards = [make_video_card(video) for video in shown]
    values = values_of_cards(store.name, cards, [video.state for video in shown])
    preset, settings = store.preset, store.defaults
    steps = range(preset.frame_step + 1, preset.max_frames + 1, preset.frame_step)
    frames = sorted({*steps, settings.num_frames})
    sizes = [f"{width}x{height}" for height, width in preset.sizes]
    size = f"{settings.width}x{settings.height}"
    counts = Counter(card.status for card in cards)
    choices = [(status, status, counts[status]) for status in _STATUSES]
    values |= {
        "refresh_seconds": 0,
        "summary": [],
        "choices": [("", "all", len(cards)), *choices],
        "style": Markup(values["style"]) + _read("page.css"),
        "script": Markup(values["script"]) + _read("page.js"),
        "example": _EXAMPLES.get(preset.name, _EXAMPLE),
        "takes_image": store.model.transformer.image_to_video,
        "loras": list(store.loras()),
        "sizes": list(dict.fromkeys([*sizes, size])),
        "lengths": [(count, f"{count / settings.fps:.1f}") for count in frames],
        "defaults": {
            "size": size,
            "num_frames": settings.num_frames,
            "num_inference_steps": settings.num_inference_steps,
            "max_steps": store.model.scheduler.num_train_timesteps,
            "guidance_scale": f"{settings.guidance_scale:g}",
        },
    }
    return _environment().get_template("page.html").render(values)


def login(title: str, error: str) -> str:
    """Renders the page that asks for the key."""
    values = values_of_cards(title, [], [])
    style = Markup(values["style"]) + _read("page.css")
    return _environment().get_template("login.html").render(title=title, style=style, error=error)


def card(video: Video) -> str:
    """Renders the card of one video."""
    template = _environment().get_template("card.html")
    return template.make_module().card(make_video_card(video))  # type: ignore[attr-defined]


def make_video_card(video: Video) -> Card:
    """The gallery's card, with the API's URLs and status."""

    def url_of(path: Path) -> str:
        start = f"/v1/videos/{video.id}"
        return {
            files.VIDEO_FILE: f"{start}/content",
            CONTACT_SHEET_FILE: f"{start}/content?variant=spritesheet",
            PREVIEW_FILE: f"{start}/preview?v={video.preview}",
            files.INPUT_FILE: f"{start}/input",
        }.get(path.name, start)

    progress = None
    if not video.ended:
        done, total, what = describe_progress(video)
        progress = Progress(what, done, max(total, 1))
    made = make_card(video.state, False, url_of)
    # The path of the model is no client's business.
    facts = tuple(fact for fact in made.facts if fact[0] not in ("line", "model"))
    return dataclasses.replace(
        made, progress=progress, facts=facts, video_id=video.id, state=video.status
    )


@cache
def _environment() -> Environment:
    return make_environment(_TEMPLATES)


@cache
def _read(name: str) -> Markup:
    """The page's own style or script, the only text that is not escaped."""
    return Markup((_TEMPLATES / name).read_text("utf-8"))
