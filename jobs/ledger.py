"""What each job of a batch needs next, as its records and files show."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.records import STAGES, Job, StageRecord, outputs, read_records, warn
from runtime.errors import InputError
from runtime.files import checksum
from runtime.text import printable
from stages import files
from stages.sections import is_whole

# What a job may need besides one of its stages.
DONE, FAILED, CONFIG = "done", "failed", "config"


@dataclasses.dataclass(frozen=True)
class Counts:
    """How many jobs of a batch are done (all wanted stages are), failed, and left."""

    done: int
    failed: int
    left: int


class Ledger:
    """Tells what each job needs next, from its records and the checksums of its files."""

    def __init__(self, output_dir: Path, stages: Sequence[str], retry_failed: bool):
        """
        Args:
            stages: the wanted ones.
            retry_failed: ignore failures that were recorded before now.
        """
        self._output_dir = output_dir
        self._stages = stages
        self._forget_before = time.time() if retry_failed else 0.0
        self._checksums: dict[Path, tuple[tuple[int, ...], str]] = {}
        self._done: set[Job] = set()  # checked once, until `forget_done`
        self._unrecorded: dict[Job, str] = {}  # why jobs failed whose folder takes no record
        self._warned: set[str] = set()

    def next(self, job: Job) -> str:
        """The first wanted stage whose files are missing or differ; or CONFIG, FAILED or DONE."""
        if job in self._done:
            return DONE
        if job in self._unrecorded:
            return FAILED
        folder = self._output_dir / job.folder
        records = self.records(job)
        failed = [record for record in records.values() if record.status == "failed"]
        if any(record.started >= self._forget_before for record in failed):
            return FAILED
        for stage in self._stages:
            if not self._is_good(job, folder, stage, records):
                return stage
        if not config_is_good(folder, records):
            return CONFIG
        self._done.add(job)
        return DONE

    def lacks(self, job: Job, stages: Sequence[str]) -> bool:
        """Whether files of these stages are missing or differ from their records."""
        folder, records = self._output_dir / job.folder, self.records(job)
        return not all(self._is_good(job, folder, stage, records) for stage in stages)

    def records(self, job: Job) -> dict[str, StageRecord]:
        """Reads the records of a job; warns of each damaged one once."""
        return read_records(self._output_dir / job.folder, self._warn_once)

    def forget_done(self) -> None:
        """Makes `next` look again at the files of jobs that were done."""
        self._done.clear()

    def fail(self, job: Job, reason: str) -> None:
        """Counts a job as failed in this run; for jobs whose folder takes no record."""
        print(f"failed: {job.folder}: {printable(reason)}")
        self._unrecorded[job] = reason

    def failure(self, job: Job) -> str:
        """Returns why a job failed, in one line."""
        if job in self._unrecorded:
            return self._unrecorded[job]
        failed = (r for r in self.records(job).values() if r.status == "failed")
        return next((f"{record.stage}: {record.error}" for record in failed), "")

    def _warn_once(self, problem: str) -> None:
        if problem not in self._warned:
            self._warned.add(problem)
            warn(problem)

    def count(self, jobs: Sequence[Job]) -> Counts:
        states = [self.next(job) for job in jobs]
        done, failed = states.count(DONE), states.count(FAILED)
        return Counts(done, failed, len(jobs) - done - failed)

    def checksums(self, folder: Path, names: Sequence[str]) -> dict[str, str]:
        """The sha256 of files by name. A file is read again only if it changed.

        Raises:
            OSError, InputError: a file is missing or not a regular file.
        """
        return {name: self._checksum(folder / name) for name in names}

    def _checksum(self, path: Path) -> str:
        stat = path.stat()
        version = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if self._checksums.get(path, (None,))[0] != version:
            self._checksums[path] = version, checksum(path)
        return self._checksums[path][1]

    def _is_good(self, job: Job, folder: Path, stage: str, records: dict[str, StageRecord]) -> bool:
        """Whether a stage's files are the recorded ones, made from the files recorded now."""
        record = records.get(stage)
        if record is None or record.status != "done" or not is_whole(record.section):
            return False
        made: dict[str, str] = {}
        for before in STAGES[: STAGES.index(stage)]:
            made |= records[before].outputs if before in records else {}
        if any(made.get(name) != value for name, value in record.inputs.items()):
            return False
        try:
            return self.checksums(folder, outputs(job, stage)) == record.outputs
        except (OSError, InputError):
            return False


def recorded_sections(records: dict[str, StageRecord]) -> dict[str, dict[str, Any]]:
    """The sections of generation_config.json that the records hold and that were not changed."""
    done = (record for record in records.values() if record.status == "done")
    return {record.stage: record.section for record in done if is_whole(record.section)}


def config_is_good(folder: Path, records: dict[str, StageRecord]) -> bool:
    """Whether generation_config.json holds the sections of all records."""
    sections = recorded_sections(records)
    if not sections:
        return True
    try:
        config = files.read_config(folder)
    except InputError:
        return False
    return all(config.get(stage) == section for stage, section in sections.items())
