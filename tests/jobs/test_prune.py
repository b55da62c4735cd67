"""Pruning deletes the files of superseded jobs, and no other files."""

import dataclasses
from pathlib import Path

import pytest

import batch
from jobs.claims import Claims
from jobs.mirror import Mirror
from jobs.records import STAGES, Job, read_batch, write_job, write_record
from jobs.steps import STEPS_FILE
from jobs.superseded import write_job_ids
from runtime.errors import InputError, RunError
from stages.files import VIDEO_FILE
from tests.jobs.test_records import JOB, record


def make(folder: Path, id_: str, **fields) -> Job:
    job = dataclasses.replace(JOB, id=id_, **fields)
    write_job(folder / job.folder, job)
    write_record(folder / job.folder, record(STAGES[0], "done"))
    for name in (VIDEO_FILE, STEPS_FILE, "stage2_checkpoint-0123456789ab.safetensors"):
        (folder / job.folder / name).write_text("ours")
        (folder / job.folder / f".{name}.host.123.tmp").write_text("unfinished")
    with Claims() as claims:
        claims.take(folder / job.folder)
    return job


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A current job, and four superseded ones: plain, with a note, in use, behind a link."""
    current = make(tmp_path, "current")
    make(tmp_path, "old")
    noted = make(tmp_path, "noted")
    (tmp_path / noted.folder / "note.txt").write_text("mine")
    make(tmp_path, "used")
    elsewhere = make(tmp_path / "elsewhere", "linked")
    (tmp_path / elsewhere.folder).symlink_to(tmp_path / "elsewhere" / elsewhere.folder)
    write_job_ids(tmp_path, "jobs.jsonl", [current])
    return tmp_path


def prune(folder: Path, *more: str) -> None:
    batch.prune(batch.parse_prune([str(folder), *more]))


def files(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_nothing_is_deleted_without_yes(folder, capsys):
    before = files(folder)
    prune(folder, "--dry_run")
    assert "superseded: kite-old" in capsys.readouterr().out
    with pytest.raises(InputError, match="nothing was deleted; --yes"):
        prune(folder)
    assert files(folder) == before


def test_only_what_is_ours_and_superseded_is_deleted(folder, capsys):
    with Claims() as claims:
        claims.take(folder / "kite-used")
        prune(folder, "--yes")
    assert not (folder / "kite-old").exists()
    assert (folder / "kite-current" / VIDEO_FILE).exists()
    assert (folder / "kite-used" / VIDEO_FILE).exists()
    assert (folder / "elsewhere/kite-linked" / VIDEO_FILE).exists()
    assert (folder / "kite-noted/note.txt").read_text() == "mine"
    assert not (folder / "kite-noted" / VIDEO_FILE).exists()
    said = capsys.readouterr().out
    assert "deleted kite-old" in said and "kept kite-noted: not of this project: note.txt" in said
    assert "kite-old" not in (folder / "index.html").read_text()


def test_copies_in_a_mirror_are_deleted_with_it(folder, tmp_path_factory, capsys):
    root = tmp_path_factory.mktemp("mirror")
    states = {state.job.id: state.job for state in read_batch(folder)}
    mirror = Mirror(str(root), folder)
    for id_ in ("current", "old", "noted"):
        mirror.push(states[id_])
    (root / "kite-noted/note.txt").write_text("mine")
    prune(folder, "--yes", f"--mirror={root}")
    assert not (root / "kite-old").exists()
    assert [path.name for path in (root / "kite-noted").iterdir()] == ["note.txt"]
    assert (root / "kite-current" / VIDEO_FILE).exists()
    assert "of kite-old in the mirror" in capsys.readouterr().out


def test_a_mirror_that_fails_leaves_the_job_to_the_next_time(folder, monkeypatch):
    def fail(*_):
        raise OSError("no network")

    with monkeypatch.context() as patch:
        patch.setattr(Mirror, "delete", fail)
        with pytest.raises(RunError, match="was not deleted in the mirror: no network"):
            prune(folder, "--yes", "--mirror=memory://m")
    assert (folder / "kite-old" / VIDEO_FILE).exists()
    prune(folder, "--yes", "--mirror=memory://m")
    assert not (folder / "kite-old").exists()
