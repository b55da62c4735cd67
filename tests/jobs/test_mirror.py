"""In a mirror that others can write, no link is followed and only our files are used."""

import os
import uuid
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from jobs import mirror as module
from jobs.mirror import Mirror
from stages.files import LATENTS_FILE, VIDEO_FILE
from tests.jobs.test_records import JOB


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "out" / JOB.folder
    (folder / "claims").mkdir(parents=True)
    (folder / "claims/1").write_text("claim")
    (folder / ".secret").write_text("secret")
    (folder / "notes.txt").write_text("notes")
    (folder / "job.json").write_text("{}")
    (folder / VIDEO_FILE).write_bytes(b"video")
    return tmp_path / "out"


@pytest.fixture(params=["folder", "remote", "memory"])
def url(request, tmp_path: Path, monkeypatch) -> str:
    """A local folder, the same through fsspec, and a file system without links."""
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}"
    if request.param == "remote":
        opened = DirFileSystem(str(tmp_path), LocalFileSystem())
        monkeypatch.setattr(module, "url_to_fs", lambda url: (opened, "mirror"))
    return f"file://{tmp_path}/mirror"


def test_only_what_is_ours_is_copied(url, output_dir, tmp_path):
    Mirror(url, output_dir).push(JOB)
    if not url.startswith("memory"):
        names = sorted(os.listdir(tmp_path / "mirror" / JOB.folder))
        assert names == sorted(["job.json", VIDEO_FILE])
        (tmp_path / "mirror" / JOB.folder / ".hidden").write_text("foreign")
        (tmp_path / "mirror" / JOB.folder / "claims").mkdir()
        (tmp_path / "mirror" / JOB.folder / "claims/9").write_text("foreign")
        (tmp_path / "mirror" / "index.html").write_text("foreign")
    else:
        files = fsspec.filesystem("memory")
        assert len(files.find(url)) == 2
        files.pipe(f"{url}/{JOB.folder}/authorized_keys", b"foreign")
    assert Mirror(url, tmp_path / "new").pull([JOB]) == 2
    found = {path.name for path in (tmp_path / "new").rglob("*") if path.is_file()}
    assert found == {"job.json", VIDEO_FILE}
    assert (tmp_path / "new" / JOB.folder / VIDEO_FILE).read_bytes() == b"video"
    (output_dir / JOB.folder / VIDEO_FILE).write_bytes(b"another")
    Mirror(url, output_dir).push(JOB)  # replaces what is there
    assert Mirror(url, tmp_path / "newer").pull([JOB]) == 2
    assert (tmp_path / "newer" / JOB.folder / VIDEO_FILE).read_bytes() == b"another"


def test_only_what_is_ours_is_deleted(url, output_dir):
    mirror = Mirror(url, output_dir)
    mirror.push(JOB)
    assert mirror.delete(JOB) == 2 and mirror.delete(JOB) == 0
    assert Mirror(url, output_dir / "new").pull([JOB]) == 0
    assert (output_dir / JOB.folder / VIDEO_FILE).read_bytes() == b"video"


@pytest.mark.parametrize("url", ["folder", "remote"], indirect=True)
def test_a_link_at_the_target_is_not_followed(url, output_dir, tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("precious")
    (tmp_path / "mirror" / JOB.folder).mkdir(parents=True)
    (tmp_path / "mirror" / JOB.folder / VIDEO_FILE).symlink_to(mine)
    try:
        Mirror(url, output_dir).push(JOB)
    except OSError as error:  # where links cannot be replaced at once, they are refused
        assert VIDEO_FILE in str(error)
    else:
        assert (tmp_path / "mirror" / JOB.folder / VIDEO_FILE).read_bytes() == b"video"
        assert not (tmp_path / "mirror" / JOB.folder / VIDEO_FILE).is_symlink()
    assert mine.read_text() == "precious"
    assert not [n for n in os.listdir(tmp_path / "mirror" / JOB.folder) if n.endswith(".tmp")]


@pytest.mark.parametrize("url", ["folder", "remote"], indirect=True)
def test_a_link_in_place_of_a_folder_is_refused(url, output_dir, tmp_path):
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / VIDEO_FILE).write_text("precious")
    (tmp_path / "mirror" / JOB.folder).symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match=JOB.folder):
        Mirror(url, output_dir).push(JOB)
    assert os.listdir(tmp_path / "mine") == [VIDEO_FILE]
    assert (tmp_path / "mine" / VIDEO_FILE).read_text() == "precious"


@pytest.mark.parametrize("url", ["folder", "remote"], indirect=True)
def test_links_and_pipes_are_not_fetched(url, tmp_path):
    (tmp_path / "secret").write_text("secret")
    there = tmp_path / "mirror" / JOB.folder
    there.mkdir(parents=True)
    (there / VIDEO_FILE).symlink_to(tmp_path / "secret")
    os.mkfifo(there / LATENTS_FILE)
    assert Mirror(url, tmp_path / "new").pull([JOB]) == 0
    assert not (tmp_path / "new").exists()
