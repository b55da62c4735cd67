"""A batch's folder on disk: its jobs, and a record of each of their stages.

    DIR/NAME-ID/job.json                          the job, written before any work
                cancel.json                       asks the process that works on it to delete it
                stage1_record.json, stage2_..., stage3_...   status and checksums of the stage
                the stage files, as the stage scripts write them
                progress.json                     while a process works on it, see steps.py
                claims/                           see claims.py

Every file is written atomically. A record is written when its stage ends, by the process that holds
the job's claim. A claim that was abandoned and not released says that the process was killed.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from cogvideox.model.settings import DenoisingSettings
from jobs.claims import claim_state
from jobs.steps import STEPS_FILE, Steps, read_steps
from runtime.errors import InputError
from runtime.files import write_json
from runtime.text import printable
from runtime.typed_json import from_json, read_object
from stages import files
from stages.condition import Source
from stages.lora import LoraChoice, read_choices
from stages.preview import PREVIEW_FILE
from stages.sections import DECODE, DENOISE, ENCODE, STAGES
from stages.session import Shape
from stages.speed import EXACT, Lossy, read_lossy

JOB_FILE = "job.json"
CANCEL_FILE = "cancel.json"
CONTACT_SHEET_FILE = files.contact_sheet(Path(files.VIDEO_FILE)).name

# What each stage leaves in a job's folder, besides its section in generation_config.json.
OUTPUTS = {
    ENCODE: (files.EMBEDDINGS_FILE,),
    DENOISE: (files.LATENTS_FILE,),
    DECODE: (files.VIDEO_FILE, CONTACT_SHEET_FILE),
}
_INPUTS = {
    ENCODE: (),
    DENOISE: (files.EMBEDDINGS_FILE,),
    DECODE: (files.LATENTS_FILE,),
}
_OF_INPUT = (files.CONDITIONS_FILE, files.INPUT_FILE)  # also left by stage 1 of jobs with an input

StageStatus = Literal["done", "failed", "interrupted"]
JobStatus = Literal["done", "failed", "running", "interrupted", "pending"]


@dataclasses.dataclass(frozen=True)
class JobInput:
    """The image or video that a job starts from; its size is that of the job."""

    kind: Literal["image", "video"]
    path: str
    sha256: str
    image_fit: Literal["stretch", "crop"]
    frames: int
    encode_on: Literal["cpu", "devices"] | None
    encoder: str

    @classmethod
    def of(cls, source: Source) -> JobInput:
        """Describes a checked image or video."""
        options = source.options
        return cls(
            *(options.kind, str(options.path.resolve()), source.sha256, options.image_fit),
            *(source.condition.frames, options.encode_on, options.encoder),
        )


@dataclasses.dataclass(frozen=True)
class Job:
    """One video to make, every setting filled in."""

    id: str  # of everything that decides the output; see identity.py
    name: str  # for display; given, or made from the prompt
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
    # "exact", or the lossy options in force; see speed.Lossy.
    speed: str | dict[str, Any] = dataclasses.field(default=EXACT, hash=False)
    input: JobInput | None = None  # what the video starts from, besides the prompt
    accepted: float | None = None  # by a server, seconds since 1970; None for a line of a file
    lora: list[dict[str, Any]] = dataclasses.field(default_factory=list, hash=False)

    def __post_init__(self) -> None:
        read_lossy(self.speed)  # raises ValueError
        read_choices(self.lora)  # raises ValueError

    @property
    def loras(self) -> tuple[LoraChoice, ...]:
        """The LoRA files and their weights."""
        return read_choices(self.lora)

    @property
    def lossy(self) -> Lossy:
        """The lossy options in force."""
        return read_lossy(self.speed)

    @property
    def folder(self) -> str:
        """The name of the job's folder in the batch's."""
        return f"{self.name}-{self.id}"

    @property
    def shape(self) -> Shape:
        """Jobs of one shape share their compiled programs."""
        s, lossy = self.settings, self.lossy
        return Shape(
            *(s.height, s.width, s.num_frames, s.guided, self.max_sequence_length),
            *lossy.decides_programs(s.executed_steps),
        )


def outputs(job: Job, stage: str) -> tuple[str, ...]:
    """Returns the files that a stage leaves in a job's folder, besides its section."""
    return (*OUTPUTS[stage], *(_OF_INPUT if job.input and stage == ENCODE else ()))


def inputs(job: Job, stage: str) -> tuple[str, ...]:
    """Returns the files of earlier stages that a stage reads."""
    conditions = (files.CONDITIONS_FILE,) if job.input and stage == DENOISE else ()
    return (*_INPUTS[stage], *conditions)


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
    abandoned: bool = False  # the last process that worked on it did not release it
    steps: Steps | None = None  # of a job that is denoised right now

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
        if self.stages_done == len(STAGES):
            return "done"
        return "interrupted" if self.abandoned or "interrupted" in statuses else "pending"

    @property
    def stages_done(self) -> int:
        return sum(record.status == "done" for record in self.records.values())

    @property
    def seconds(self) -> float:
        """Spent in the stages that are done."""
        return sum(r.seconds for r in self.records.values() if r.status == "done")


def warn(problem: str) -> None:
    """Prints a problem of a batch's folder that does not end the run."""
    print(f"warning: {printable(problem)}", file=sys.stderr)


def read_batch(output_dir: Path, report: Callable[[str], None] = warn) -> list[JobState]:
    """Reads every job in a batch's folder, in the order of the job file.

    Args:
        output_dir: the batch's folder.
        report: called with one line for each job that cannot be read and is left out.

    Raises:
        InputError: the folder cannot be read.
    """
    if not output_dir.is_dir():
        raise InputError(f"{output_dir} is not a folder")
    states, now = [], time.time()
    for path in sorted(output_dir.glob(f"*/{JOB_FILE}")):
        if path.parent.name.startswith("."):  # being deleted
            continue
        try:
            job = read_job(path.parent)
        except InputError as error:
            report(f"skipping a job: {error}")
            continue
        states.append(read_state(job, path.parent, now, report))
    return sorted(
        states, key=lambda state: (state.job.line, state.job.accepted or 0, state.folder.name)
    )


def read_state(
    job: Job, folder: Path, now: float, report: Callable[[str], None] = warn
) -> JobState:
    """Reads how far a job is from its folder; arguments as of `read_batch`, `now` in seconds."""
    claim = claim_state(folder, now)
    records = read_records(folder, report)
    steps = read_steps(folder, report) if claim == "alive" else None
    return JobState(job, folder, records, claim == "alive", claim == "abandoned", steps)


def write_job(folder: Path, job: Job) -> None:
    """Writes job.json, unless just that is there: hundreds of flushes take seconds."""
    try:
        if read_job(folder) == job:
            return
    except InputError:
        pass  # damaged or missing; written again
    write_json(folder / JOB_FILE, dataclasses.asdict(job))


def read_job(folder: Path) -> Job:
    """Raises InputError for a file that is missing, damaged or of another version."""
    path = folder / JOB_FILE
    try:
        return from_json(Job, read_object(path))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path} does not describe a job: {error}") from error


def write_record(folder: Path, record: StageRecord) -> None:
    write_json(record_path(folder, record.stage), dataclasses.asdict(record))


def read_records(folder: Path, report: Callable[[str], None] = warn) -> dict[str, StageRecord]:
    """Reads the records in a job's folder, by stage; a damaged one counts as missing.

    Args:
        folder: the job's folder.
        report: called with one line for each damaged record.
    """
    records = {}
    for stage in STAGES:
        path = record_path(folder, stage)
        try:
            record = from_json(StageRecord, read_object(path))
            if record.stage != stage:
                raise ValueError(f"it is of {record.stage}")
        except (FileNotFoundError, NotADirectoryError):
            continue
        except InputError as error:
            report(f"ignoring a record: {error}")
        except ValueError as error:
            report(f"ignoring a record: {path} is not one: {error}")
        else:
            records[stage] = record
    return records


def worker_name() -> str:
    """Returns a display name of this process: host:process number."""
    return f"{os.uname().nodename}:{os.getpid()}"


def record_path(folder: Path, stage: str) -> Path:
    return folder / f"{stage.partition('_')[0]}_record.json"


_FILES = frozenset((
    *(name for names in OUTPUTS.values() for name in names),
    *_OF_INPUT,
    *(record_path(Path(), stage).name for stage in STAGES),
    *(files.CONFIG_FILE, JOB_FILE, CANCEL_FILE, STEPS_FILE, PREVIEW_FILE),
))  # fmt: skip


def is_job_file(name: str) -> bool:
    """Whether a file in a job's folder is one of this project's, by its name; claims are not."""
    return name in _FILES or files.is_checkpoint(name)
