"""The gallery shows every job, its links lead to files, and it escapes others' text."""

import base64
import dataclasses
import hashlib
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from jinja2 import UndefinedError

from cogvideox.model.settings import DenoisingSettings
from jobs.claims import Claims
from jobs.gallery import (
    GALLERY_FILE,
    Gallery,
    make_environment,
    template_values,
    write_gallery,
)
from jobs.records import (
    CONTACT_SHEET_FILE,
    STAGES,
    Job,
    read_batch,
    write_job,
    write_record,
)
from jobs.superseded import find_superseded, write_job_ids
from runtime.errors import InputError
from stages import files as stage_files
from tests.jobs.test_records import JOB, record

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror="alert(1)">',
    "</article></main></html>",
    "&lt;b&gt; & &amp; ' \" `",
    "</script><script>alert(1)</script>",
    "<!-- <style>*{display:none}</style>",
    "right to left \u202e and NUL \x01",
    "\ud800 half a letter",
]
VOID = {"meta", "link", "input", "img"}


class Page(HTMLParser):
    """The elements of a page with their attributes, its text, and whether tags nest."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text, self.open, self.own = "", [], {"script": "", "style": ""}
        self.feed(path.read_text("utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID | {"html"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag == "html" or self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in self.own:
            self.own[self.open[-1]] += data
        else:
            self.text += data

    def all(self, tag: str, **attributes: str) -> list[dict]:
        return [a for t, a in self.elements if t == tag and attributes.items() <= a.items()]


def add_job(folder: Path, number: int, statuses: list[str], **fields) -> Job:
    job = dataclasses.replace(JOB, id=f"{number:012x}", line=number, **fields)
    write_job(folder / job.folder, job)
    error = "3 values are NaN <script>"
    for stage, status in zip(STAGES, statuses, strict=False):
        said = {"error": error, "traceback": f"{error}\n" * 3} if status == "failed" else {}
        write_record(folder / job.folder, record(stage, status, seconds=61.5, **said))
    if statuses == ["done"] * 3:
        (folder / job.folder / stage_files.VIDEO_FILE).touch()
        (folder / job.folder / stage_files.CONFIG_FILE).touch()
        header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\x03\xc0\0\0\x02\x10"
        (folder / job.folder / CONTACT_SHEET_FILE).write_bytes(header)
    return job


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "a batch & more <i>"
    add_job(folder, 1, ["done"] * 3, name="100% #1?")
    add_job(folder, 2, ["done", "failed"])
    add_job(folder, 3, ["done", "interrupted"])
    add_job(folder, 4, [])
    return folder


def test_every_job_is_shown(folder):
    page = Page(write_gallery(folder, read_batch(folder)))
    statuses = [card["data-status"] for card in page.all("article")]
    assert statuses == ["done", "failed", "interrupted", "pending"]
    assert "1 of 4 videos" in page.text and "3 min 04 s" in page.text
    assert "stage2_transformer: 3 values are NaN <script>" in page.text
    buttons = [button["data-status"] for button in page.all("button")]
    assert buttons == ["", "done", "failed", "interrupted", "pending"]
    assert page.all("img", width="960", height="528", loading="lazy")


def test_links_lead_to_files(folder):
    path = write_gallery(folder, read_batch(folder))
    page = Page(path)
    links = [a["href"] for a in page.all("a")] + [img["src"] for img in page.all("img")]
    assert len(links) == 5 and all(link.startswith("./") for link in links)
    for link in links:
        assert (path.parent / unquote(link)).is_file()
        assert not re.search(r"[^\w./%-]", link)


@pytest.mark.parametrize("text", HOSTILE)
def test_text_stays_text(text, tmp_path):
    calm, hostile = tmp_path / "calm", tmp_path / "hostile"
    for folder, said in ((calm, "calm"), (hostile, text)):
        add_job(folder, 1, ["done", "failed"])
        state = read_batch(folder)[0]
        job = dataclasses.replace(state.job, prompt=said, negative_prompt=said, model_id=said)
        failed = dataclasses.replace(record(STAGES[1], "failed"), error=said, traceback=said)
        state = dataclasses.replace(state, job=job, records={STAGES[1]: failed})
        write_gallery(folder, [state])
    pages = [Page(folder / GALLERY_FILE) for folder in (calm, hostile)]
    assert pages[0].elements == pages[1].elements
    assert pages[1].text.count(text.encode("utf-8", "replace").decode()) == 5


def test_the_page_runs_its_own_script_and_nothing_from_elsewhere(folder):
    page = Page(write_gallery(folder, read_batch(folder)))
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    for kind, content in page.own.items():
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy["content"]
        assert len(page.all(kind)) == 1
    assert "default-src 'none'" in policy["content"]
    assert not any(name.startswith("on") for _, a in page.elements for name in a)
    assert "//" not in re.sub(r"^//.*|^ *// .*", "", page.own["script"], flags=re.MULTILINE)
    assert "url(" not in page.own["style"] and "@import" not in page.own["style"]


def test_it_keeps_up_with_the_batch(folder, capsys):
    gallery = Gallery(folder)
    gallery.update()
    add_job(folder, 5, ["done"] * 3)
    gallery.update(now=True)
    assert "2 of 5 videos" in Page(folder / GALLERY_FILE).text
    # A damaged job is named once and stops nothing.
    (folder / JOB.folder).mkdir()
    (folder / JOB.folder / "job.json").write_text("{")
    add_job(folder, 6, ["done"] * 3)
    gallery.update(now=True)
    gallery.update(now=True)
    said = capsys.readouterr().err
    assert said.count("job.json is not valid JSON") == 1
    assert "3 of 6 videos" in Page(folder / GALLERY_FILE).text
    # A failed write is tried again.
    (folder / GALLERY_FILE).unlink()
    (folder / GALLERY_FILE).mkdir()
    gallery.update(now=True)
    assert "warning: index.html was not updated" in capsys.readouterr().err


def test_a_call_that_comes_too_early_writes_later(folder):
    gallery = Gallery(folder)
    gallery.update()
    add_job(folder, 5, ["failed"])
    gallery._due = time.monotonic() + 0.2
    gallery.update()
    gallery.update()
    assert "1 of 4 videos" in Page(folder / GALLERY_FILE).text
    deadline = time.monotonic() + 30
    while "1 of 5 videos" not in Page(folder / GALLERY_FILE).text:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_page_refreshes_itself_only_while_jobs_are_left(tmp_path):
    def refreshes() -> bool:
        (main,) = Page(write_gallery(tmp_path, read_batch(tmp_path))).all("main")
        return "data-refresh" in main

    add_job(tmp_path, 1, ["done"] * 3)
    add_job(tmp_path, 2, ["failed"])
    assert not refreshes()
    pending = add_job(tmp_path, 3, ["done"])
    assert refreshes()
    add_job(tmp_path, 3, ["done", "interrupted"])
    assert not refreshes()
    with Claims() as claims:
        claims.take(tmp_path / pending.folder)
        assert refreshes()


FOREIGN = ['1" onload="alert(1)', "<script>alert(1)</script>", None, [1], {"a": "<b>"}, 1e999]


@pytest.mark.parametrize("value", FOREIGN)
def test_settings_of_other_types_do_not_break_the_page(value, folder):
    calm = Page(write_gallery(folder, read_batch(folder)))
    # `read_batch` skips such jobs; the page does not rely on it.
    foreign = DenoisingSettings(**dict.fromkeys(dataclasses.asdict(JOB.settings), value))
    states = [
        dataclasses.replace(state, job=dataclasses.replace(state.job, settings=foreign))
        for state in read_batch(folder)
    ]
    page = Page(write_gallery(folder, states))
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in calm.elements]
    assert [set(a) for _, a in page.elements] == [set(a) for _, a in calm.elements]
    (link,) = page.all("a", **{"class": "play"})
    assert link["data-width"] == str(value)


def test_a_changed_line_supersedes_the_older_job(tmp_path):
    """Line 1 keeps its job, line 2 has a new one, and line 4 was never run with this file."""
    job_file = tmp_path / "elsewhere" / "jobs.jsonl"
    kept = add_job(tmp_path, 1, ["done"] * 3, name="kept")
    old = add_job(tmp_path, 2, ["done"] * 3, name="old")
    other = add_job(tmp_path, 4, ["done"] * 3, name="other")
    assert find_superseded(tmp_path, read_batch(tmp_path)) == set()
    write_job_ids(tmp_path, job_file.name, [kept, old])
    assert find_superseded(tmp_path, read_batch(tmp_path)) == set()
    new = dataclasses.replace(old, id="f" * 12, name="new")
    write_job(tmp_path / new.folder, new)
    write_job_ids(tmp_path, job_file.name, [kept, new])
    assert find_superseded(tmp_path, read_batch(tmp_path)) == {old.id}
    # The first job file supersedes no job of the second.
    write_job_ids(tmp_path, "more.jsonl", [old])
    assert find_superseded(tmp_path, read_batch(tmp_path)) == set()
    write_job_ids(tmp_path, "more.jsonl", [])

    page = Page(write_gallery(tmp_path, read_batch(tmp_path)))
    cards = [card["data-status"] for card in page.all("article")]
    assert sorted(cards) == ["done", "done", "pending", "superseded"]
    assert "2 of 3 videos" in page.text and "this one was done" in page.text
    # The same name on another line, as after lines were moved.
    renamed = dataclasses.replace(other, id="e" * 12, line=9)
    write_job(tmp_path / renamed.folder, renamed)
    write_job_ids(tmp_path, job_file.name, [kept, new, renamed])
    assert find_superseded(tmp_path, read_batch(tmp_path)) == {old.id, other.id}
    with Claims() as claims:
        claims.take(tmp_path / old.folder)
        cards = Page(write_gallery(tmp_path, read_batch(tmp_path))).all("article")
        assert [c["data-status"] for c in cards].count("running") == 1


@pytest.mark.parametrize("content", ["{", "[]", '{"job_files": [1]}', '{"job_files": {"a": 1}}'])
def test_a_damaged_list_of_jobs_is_named_and_replaced(content, folder, capsys):
    (folder / "batch.json").write_text(content)
    with pytest.raises(InputError, match="batch.json"):
        find_superseded(folder, [])
    write_job_ids(folder, "jobs.txt", [])
    assert "warning: writing batch.json anew" in capsys.readouterr().out
    assert find_superseded(folder, []) == set()


def test_another_page_can_extend_the_gallery(folder, tmp_path):
    (tmp_path / "form.html").write_text(
        '{% extends "gallery.html" %}'
        """{% block form_action %}'self'{% endblock %}"""
        '{% block form %}<form action="{{ action }}"></form>{% endblock %}'
    )
    template = make_environment(tmp_path).get_template("form.html")
    values = template_values("<b>", read_batch(folder))
    (tmp_path / "form_page.html").write_text(template.render(values, action='"jobs'))
    page = Page(tmp_path / "form_page.html")
    assert page.all("form", action='"jobs') and len(page.all("article")) == 4
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert "form-action 'self';" in policy["content"]
    with pytest.raises(UndefinedError, match="action"):
        template.render(values)
