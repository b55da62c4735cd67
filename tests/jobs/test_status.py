"""The status table has a row for each job; others' text cannot control the terminal."""

import dataclasses
from pathlib import Path

from jobs.records import STAGES, JobState
from jobs.status import table
from tests.jobs.test_records import JOB, record

HOSTILE = "\x1b]0;owned\x07 \x9b2J \u202e up\nand down"


def test_hostile_text_is_escaped():
    settings = dataclasses.replace(JOB.settings, width="\x1b[31m160")
    job = dataclasses.replace(JOB, prompt=HOSTILE, name=HOSTILE, settings=settings)
    failed = {STAGES[0]: record(STAGES[0], "failed", error=HOSTILE)}
    states = [JobState(job, Path(job.folder), records, False) for records in ({}, failed)]
    said = table(states)
    assert len(said.splitlines()) == 4
    assert "\x1b" not in said and "\x9b" not in said and "\u202e" not in said
    assert r"\x1b]0;owned\x07 \x9b2J" in said
    assert "stage1_text_encoder: \\x1b]0;owned" in said
    assert said.splitlines()[-1] == "2 job(s): 1 failed, 1 pending"


def test_long_text_is_cut():
    job = dataclasses.replace(JOB, prompt="kite " * 40)
    (_, row, _) = table([JobState(job, Path(job.folder), {}, False)]).splitlines()
    assert row.endswith("…") and len(row) < 200


def test_a_strength_shows_the_steps_that_run():
    settings = dataclasses.replace(JOB.settings, num_inference_steps=50, strength=0.58)
    job = dataclasses.replace(JOB, settings=settings)
    (_, row, _) = table([JobState(job, Path(job.folder), {}, False)]).splitlines()
    assert " 28 of 50 " in row


def test_superseded_jobs_are_marked():
    states = [
        JobState(dataclasses.replace(JOB, id=id_), Path(id_), {}, claimed)
        for id_, claimed in (("new", False), ("old", False), ("works", True))
    ]
    _, *rows, counts = table(states, {"old", "works"}).splitlines()
    assert [row.split()[1] for row in rows] == ["pending", "superseded", "running"]
    assert counts == "3 job(s): 1 pending, 1 running, 1 superseded"
