"""The gallery: every job is in it, its links lead to files, other people's text stays text."""

import base64
import dataclasses
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from jobs.gallery import GALLERY_FILE, Gallery, write_gallery
from jobs.records import CONTACT_SHEET_FILE, STAGES, JobState, read_batch, write_job, write_record
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


def add_job(folder: Path, number: int, statuses: list[str], **fields) -> JobState:
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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "a batch & more <i>"
    add_job(folder, 1, ["done"] * 3, name="100% #1?")
    add_job(folder, 2, ["done", "failed"])
    add_job(folder, 3, ["done", "running"])
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
    # A damaged job is said, and stops nothing.
    (folder / JOB.folder).mkdir()
    (folder / JOB.folder / "job.json").write_text("{")
    gallery.update(now=True)
    assert "warning: no new index.html" in capsys.readouterr().out
    assert "2 of 5 videos" in Page(folder / GALLERY_FILE).text
