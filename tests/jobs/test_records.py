"""Records: what is written is what is read; the status of a job follows from its records."""

import dataclasses
from pathlib import Path

import pytest

from cogvideox.model.settings import DenoisingSettings
from jobs import records
from jobs.claims import Claims
from jobs.records import STAGES, Job, StageRecord, read_batch, write_job, write_record
from runtime.errors import InputError

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
        (["done", "running"], "interrupted"),
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


def test_a_damaged_job_is_named_and_a_damaged_record_counts_as_missing(tmp_path: Path, capsys):
    folder = tmp_path / JOB.folder
    write_job(folder, JOB)
    (folder / "stage1_record.json").write_text('{"stage": 1')
    assert records.read_records(folder) == {}
    assert "stage1_record.json" in capsys.readouterr().out
    (folder / records.JOB_FILE).write_text("{}")
    with pytest.raises(InputError, match="job.json"):
        read_batch(tmp_path)
