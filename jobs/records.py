"""A batch's folder on disk: its jobs, and a record of each of their stages.

    DIR/NAME-ID/job.json                          the job, written before any work
                stage1_record.json, stage2_..., stage3_...   status and checksums of the stage
                the stage files, as the stage scripts write them
                claims/                           see claims.py

Every file is written atomically. A record says "running" from before its stage starts until the
stage ends. If it says so without a valid claim, the process was killed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from pathlib import Path
from types import UnionType
from typing import Any, Literal

from cogvideox.model.settings import DenoisingSettings
from jobs.claims import is_claimed
from runtime.errors import InputError
from runtime.files import write_json
from stages import files
from stages.files import STAGES
from stages.session import Shape

JOB_FILE = "job.json"
CONTACT_SHEET_FILE = files.contact_sheet(Path(files.VIDEO_FILE)).name

# What each stage leaves in a job's folder, besides its section in generation_config.json.
OUTPUTS = {
    files.ENCODE: (files.EMBEDDINGS_FILE,),
    files.DENOISE: (files.LATENTS_FILE,),
    files.DECODE: (files.VIDEO_FILE, CONTACT_SHEET_FILE),
}
INPUTS = {
    files.ENCODE: (),
    files.DENOISE: (files.EMBEDDINGS_FILE,),
    files.DECODE: (files.LATENTS_FILE,),
}

StageStatus = Literal["running", "done", "failed", "interrupted"]
JobStatus = Literal["done", "failed", "running", "interrupted", "pending"]


@dataclasses.dataclass(frozen=True)
class Job:
    """One video to make, every setting filled in."""

    id: str  # of everything that decides the output; see identity.py
    name: str  # for people; given, or made of the prompt
    line: int  # of the job file
    prompt: str
    negative_prompt: str
    max_sequence_length: int
    settings: DenoisingSettings
    model_id: str
    revision: str | None  # the hub commit, None for a folder
    dtype: str
    decoder: str  # "torchax" or "flax"
    quality: int | None
    no_metadata: bool

    @property
    def folder(self) -> str:
        """The name of the job's folder in the batch's."""
        return f"{self.name}-{self.id}"

    @property
    def shape(self) -> Shape:
        """Jobs of one shape share their compiled programs."""
        s = self.settings
        return Shape(s.height, s.width, s.num_frames, s.guided, self.max_sequence_length)


@dataclasses.dataclass(frozen=True)
class StageRecord:
    """The status and results of one stage of one job."""

    stage: str  # a key of OUTPUTS
    status: StageStatus
    attempt: int  # from 1
    worker: str  # host:process
    started: float  # seconds since 1970
    seconds: float = 0.0  # without loading and compiling, which other jobs share
    error: str | None = None  # one line
    traceback: str | None = None
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)  # file name -> sha256
    outputs: dict[str, str] = dataclasses.field(default_factory=dict)  # file name -> sha256
    section: dict[str, Any] = dataclasses.field(default_factory=dict)  # in generation_config.json


@dataclasses.dataclass(frozen=True)
class JobState:
    """A job as its folder shows it."""

    job: Job
    folder: Path
    records: dict[str, StageRecord]  # by stage; a stage that never started has none
    claimed: bool  # a living process works on it

    @property
    def failure(self) -> StageRecord | None:
        """The record of the stage that failed."""
        return next((r for r in self.records.values() if r.status == "failed"), None)

    @property
    def status(self) -> JobStatus:
        """ "done" with all three stages; "pending" between stages and before the first."""
        statuses = {record.status for record in self.records.values()}
        if self.claimed:
            return "running"
        if "failed" in statuses:
            return "failed"
        if statuses & {"running", "interrupted"}:
            return "interrupted"
        return "done" if self.stages_done == len(STAGES) else "pending"

    @property
    def stages_done(self) -> int:
        return sum(record.status == "done" for record in self.records.values())

    @property
    def seconds(self) -> float:
        """Spent in the stages that are done."""
        return sum(r.seconds for r in self.records.values() if r.status == "done")


def read_batch(output_dir: Path) -> list[JobState]:
    """Every job in a batch's folder, in the order of the job file.

    Raises:
        InputError: the folder or a job in it cannot be read.
    """
    if not output_dir.is_dir():
        raise InputError(f"{output_dir} is not a folder")
    now = time.time()
    states = [
        JobState(read_job(path.parent), path.parent, read_records(path.parent),
                 is_claimed(path.parent, now))
        for path in output_dir.glob(f"*/{JOB_FILE}")
    ]  # fmt: skip
    return sorted(states, key=lambda state: (state.job.line, state.folder.name))


def write_job(folder: Path, job: Job) -> None:
    """Writes job.json, unless just that is there: hundreds of flushes take seconds."""
    path, fields = folder / JOB_FILE, dataclasses.asdict(job)
    try:
        written = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        written = None
    if written != fields:
        write_json(path, fields)


def read_job(folder: Path) -> Job:
    """Raises InputError for a file that is missing, damaged or of another version."""
    path = folder / JOB_FILE
    try:
        fields = json.loads(path.read_text("utf-8"))
        job = Job(**fields | {"settings": DenoisingSettings(**fields["settings"])})
        _require_types(job, str, "id", "name", "prompt", "negative_prompt", "model_id")
        _require_types(job, int, "line")
        _require_types(job, str | None, "revision")
        return job
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} does not describe a job: {error!r}") from error


def write_record(folder: Path, record: StageRecord) -> None:
    write_json(_record_path(folder, record.stage), dataclasses.asdict(record))


def read_records(folder: Path) -> dict[str, StageRecord]:
    """The records in a job's folder, by stage; one that cannot be read counts as missing."""
    records = {}
    for stage in STAGES:
        try:
            record = StageRecord(**json.loads(_record_path(folder, stage).read_text("utf-8")))
            _require_types(record, str, "status")
            _require_types(record, int | float, "attempt", "started", "seconds")
        except FileNotFoundError:
            continue
        except (ValueError, TypeError) as error:
            print(f"warning: {_record_path(folder, stage)} is no record: {error!r}")
            continue
        records[stage] = record
    return records


def _require_types(value: object, type_: type | UnionType, *names: str) -> None:
    """Raises TypeError for an attribute of another type, as in files of other programs."""
    for name in names:
        if not isinstance(getattr(value, name), type_):
            raise TypeError(f"{name} is {getattr(value, name)!r}")


def checksum(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def worker_name() -> str:
    """This process, for people: host:process number."""
    return f"{os.uname().nodename}:{os.getpid()}"


def _record_path(folder: Path, stage: str) -> Path:
    return folder / f"{stage.partition('_')[0]}_record.json"
