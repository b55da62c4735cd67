"""Records are read as they were written; the status of a job follows from its records."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from cogvideox.model.settings import DenoisingSettings
from jobs import records
from jobs.claims import Claims
from jobs.records import STAGES, Job, StageRecord, read_batch, write_job, write_record
from runtime.errors import InputError
from runtime.files import checksum

JOB = Job(
    id="0123456789ab",
    name="kite",
    line=3,
    prompt='A "red" kite <b>&\n',
    negative_prompt="",
    max_sequence_length=32,
    settings=DenoisingSettings(96, 160, 17, 16, 25, 3.0, False, "dpm", 0),
    model_id="models/toyworld",
    revision=None,
    dtype="float32",
    decoder="torchax",
    quality=None,
    no_metadata=False,
)


def record(stage: str, status: str, **more) -> StageRecord:
    return StageRecord(stage, status, attempt=1, worker="host:1", started=1.0, **more)


def test_what_is_written_is_read(tmp_path: Path):
    folder = tmp_path / JOB.folder
    write_job(folder, JOB)
    done = record(STAGES[0], "done", seconds=1.5, outputs={"a": "b"}, section={"seed": 0})
    write_record(folder, done)
    other = dataclasses.replace(JOB, id="ffff", line=1)
    write_job(tmp_path / other.folder, other)
    first, second = read_batch(tmp_path)
    assert (first.job, second.job) == (other, JOB)
    assert second.records == {STAGES[0]: done} and second.seconds == 1.5


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ([], "pending"),
        (["done"], "pending"),
        (["done", "interrupted"], "interrupted"),
        (["done", "failed"], "failed"),
        (["done", "done", "done"], "done"),
    ],
)
def test_status(statuses, expected, tmp_path: Path):
    folder = tmp_path / JOB.folder
    write_job(folder, JOB)
    for stage, status in zip(STAGES, statuses, strict=False):
        write_record(folder, record(stage, status))
    assert read_batch(tmp_path)[0].status == expected
    with Claims() as claims:
        claims.take(folder)
        assert read_batch(tmp_path)[0].status == "running"


def test_a_killed_process_leaves_an_interrupted_job(tmp_path: Path):
    folder = tmp_path / JOB.folder
    write_job(folder, JOB)
    with Claims(expiry=60) as claims:
        claim = claims.take(folder)
        assert read_batch(tmp_path)[0].status == "running"
        os.utime(claim.path, (1, 1))
        assert read_batch(tmp_path)[0].status == "interrupted"
        for stage in STAGES:
            write_record(folder, record(stage, "done"))
        assert read_batch(tmp_path)[0].status == "done"
    assert read_batch(tmp_path)[0].status == "done"


DAMAGED = {
    "empty": b"",
    "truncated": b'{"stage": 1',
    "not an object": b"[]",
    "another object": b"{}",
    "deep": b"[" * 200_000,
    "no text": b"\xff\xfe\x00",
    "infinite": b'{"line": 1e999}',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_records_count_as_missing_and_damaged_jobs_are_skipped(content, tmp_path: Path):
    other = dataclasses.replace(JOB, id="ffff", line=1)
    for job in (JOB, other):
        write_job(tmp_path / job.folder, job)
    (tmp_path / JOB.folder / "stage1_record.json").write_bytes(content)
    said: list[str] = []
    assert records.read_records(tmp_path / JOB.folder, said.append) == {}
    assert "stage1_record.json" in said[0] and len(said) == 1
    (tmp_path / JOB.folder / records.JOB_FILE).write_bytes(content)
    said.clear()
    assert [state.job for state in read_batch(tmp_path, said.append)] == [other]
    assert len(said) == 1 and f"{JOB.folder}/job.json" in said[0]
    write_job(tmp_path / JOB.folder, JOB)  # as the next run does
    assert records.read_job(tmp_path / JOB.folder) == JOB


@pytest.mark.parametrize(
    "change",
    [{"line": "3"}, {"line": True}, {"settings": 3}, {"dtype": None}, {"quality": 1.5}, {"x": 1}],
)
def test_types_are_checked(change, tmp_path: Path):
    write_job(tmp_path, JOB)
    fields = json.loads((tmp_path / records.JOB_FILE).read_text())
    (tmp_path / records.JOB_FILE).write_text(json.dumps(fields | change))
    with pytest.raises(InputError, match=next(iter(change))):
        records.read_job(tmp_path)


def test_what_is_no_regular_file_is_no_record(tmp_path: Path):
    said: list[str] = []
    os.mkfifo(tmp_path / "stage1_record.json")
    (tmp_path / "stage2_record.json").mkdir()
    assert records.read_records(tmp_path, said.append) == {}
    assert len(said) == 2
    with pytest.raises(InputError, match="named pipe"):
        checksum(tmp_path / "stage1_record.json")
