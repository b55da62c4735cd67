"""A browser drives the page: make, watch, play, cancel, delete, reuse; nothing hostile runs.

Needs a browser of the machine, such as Debian's package `chromium`, or its path in CHROMIUM.
"""

import re

import numpy as np
import pytest
from playwright.sync_api import expect

from cogvideox.video.preview import PreviewFactors, write_factors
from tests.tiny_models import save_tiny_model
from tests.web.browsing import Watched, browser_path, open_browser
from tests.web.serving import Server

pytestmark = pytest.mark.skipif(browser_path() is None, reason="there is no Chromium here")
expect.set_options(timeout=300_000)  # for machines with much else to do
HOSTILE = "<script>alert(1)</script>"
HOSTILE += '<img src=x onerror=alert(1)>"\' onfocus=alert(1) autofocus="</textarea><b>'


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model = tmp_path_factory.mktemp("model") / "tiny"
    save_tiny_model(model, sample_height=4, sample_width=6, sample_frames=5)
    weights = tuple(map(tuple, 0.1 * np.random.default_rng(0).normal(size=(8, 3))))
    write_factors(model / "preview_factors.json", PreviewFactors(weights, (0.5,) * 3), 30.0, 1)
    return model


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with Server(model, tmp_path_factory.mktemp("served") / "videos") as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture
def watched(browser, server):
    watched = Watched(browser, server.url)
    yield watched
    assert not watched.errors and not watched.others
    watched.page.context.close()


def make(page, prompt: str, steps: int, seed: int = 1) -> str:
    """Sends the form; returns the new card's selector."""
    before = {card.get_attribute("data-id") for card in page.locator("article").all()}
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("Steps", exact=True).fill(str(steps))
    page.get_by_label("Seed").fill(str(seed))
    page.get_by_role("button", name="Make video").click()
    expect(page.locator("article")).to_have_count(len(before) + 1)
    cards = {card.get_attribute("data-id") for card in page.locator("article").all()}
    (new,) = cards - before
    return f'article[data-id="{new}"]'


def test_make_watch_play_reuse_and_delete(watched, server):
    page = watched.page
    card = page.locator(make(page, "a red kite", 1000, seed=7))
    preview = card.locator(".preview img")
    expect(preview).to_be_visible()
    expect(card.locator("progress + p")).to_have_text(re.compile(r"step \d+ of 1000"))
    assert preview.evaluate("image => image.naturalWidth") == 6
    sources = {preview.get_attribute("src")}
    while len(sources) < 2:
        sources.add(preview.get_attribute("src"))
        page.wait_for_timeout(50)
    expect(card).to_have_attribute("data-state", "completed")
    expect(page.get_by_role("status").filter(has_text="a red kite")).to_have_text(
        "a red kite: completed"
    )

    card.get_by_role("link", name="Play").click()
    video = card.locator("video")
    expect(video).to_be_focused()
    # Not wait_for_function: it polls with eval, which the page's policy forbids.
    while video.evaluate("video => video.currentTime") == 0:
        page.wait_for_timeout(50)
    with page.expect_download() as download:
        card.get_by_role("link", name="Download").click()
    (file,) = server.folder.glob("a-red-kite-*/output_video.mp4")
    assert download.value.path().read_bytes() == file.read_bytes()

    page.get_by_label("Prompt", exact=True).fill("")
    card.get_by_role("button", name="Reuse settings").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a red kite")
    expect(page.get_by_label("Steps", exact=True)).to_have_value("1000")
    expect(page.get_by_label("Seed")).to_have_value("7")

    card.get_by_role("button", name="Delete").click()
    expect(card).to_have_count(0)
    assert watched.dialogs == ["Delete this video? Its files are deleted."]
    while file.parent.exists():
        page.wait_for_timeout(50)


def test_cancel_by_keyboard(watched, server):
    page = watched.page
    card = page.locator(make(page, "a blue kite", 1000, seed=8))
    expect(card).to_have_attribute("data-state", "in_progress")
    button = card.get_by_role("button", name="Cancel")
    button.focus()
    page.keyboard.press("Enter")
    expect(card).to_have_count(0)
    assert watched.dialogs == ["Cancel this video? Its files are deleted."]
    while "a blue kite" in [v["prompt"] for v in server.ask("GET", "/v1/videos").json["data"]]:
        page.wait_for_timeout(50)


def test_a_hostile_prompt_is_text(watched, server):
    page = watched.page
    page.get_by_label("Negative prompt").fill(HOSTILE)
    card = page.locator(make(page, HOSTILE, 2))
    expect(card).to_have_attribute("data-state", "completed")
    expect(card.locator(".prompt")).to_have_text(HOSTILE)
    assert card.locator("b, script, textarea, [onerror]").count() == 0
    page.reload()
    expect(card.locator(".prompt")).to_have_text(HOSTILE)
    card.get_by_role("button", name="Delete").click()
    expect(card).to_have_count(0)
    assert watched.dialogs == ["Delete this video? Its files are deleted."]


def test_a_wrong_field_is_named(watched):
    page = watched.page
    page.get_by_label("Prompt", exact=True).fill("x")
    page.evaluate(
        "() => { const size = document.querySelector('[name=size]');"
        " size.options[0].value = '7x7'; size.selectedIndex = 0; }"
    )
    page.get_by_role("button", name="Make video").click()
    expect(page.get_by_role("alert")).to_have_text(re.compile("nearest: 16"))
    expect(page.get_by_label("Size")).to_be_focused()
    # The browser logs every answer of 400.
    assert len(watched.errors) == 1 and "400" in watched.errors[0]
    watched.errors.clear()


def test_it_follows_videos_of_others(watched, server):
    made = server.create("a green kite", seed=9)
    card = watched.page.locator(f'article[data-id="{made["id"]}"]')
    expect(card).to_have_attribute("data-state", "completed")
    assert server.ask("DELETE", f"/v1/videos/{made['id']}").status == 200
    expect(card).to_have_count(0)


def test_it_asks_for_the_key(browser, model, tmp_path):
    file = tmp_path / "key"
    file.write_text("0123456789abcdef\n")
    file.chmod(0o600)
    more = ("--no_worker", f"--api_key_file={file}")
    with Server(model, tmp_path / "videos", *more) as server:
        watched = Watched(browser, server.url)
        page = watched.page
        page.get_by_label("Key").fill("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_have_text("Wrong key.")
        watched.errors.clear()  # the browser logs answers of 401
        page.get_by_label("Key").fill("0123456789abcdef")
        page.keyboard.press("Enter")
        card = page.locator(make(page, "a red kite", 2))
        expect(card.locator("progress + p")).to_have_text("place 1 in the queue")
        assert "0123456789abcdef" not in str(page.context.cookies())
        assert not watched.errors and not watched.others
        page.context.close()
