"""Tell jobs that the job file still asks for from those of lines that have changed since.

A changed line is a new job with a folder of its own; the folder of the old job stays. `batch.json`
in the batch's folder keeps the ids that each job file asked for in its latest run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jobs.records import Job, JobState
from runtime.errors import InputError
from runtime.files import write_json
from runtime.typed_json import read_object

BATCH_FILE = "batch.json"


def write_job_ids(output_dir: Path, job_file: str, jobs: Sequence[Job]) -> None:
    """Writes which jobs a job file asks for now, over what it asked for before.

    Args:
        output_dir: the batch's folder.
        job_file: its name without the folder.
        jobs: all jobs of the file, selected or not.
    """
    _write(output_dir, _known_job_files(output_dir) | {job_file: [job.id for job in jobs]})


def add_job_ids(output_dir: Path, source: str, jobs: Sequence[Job]) -> None:
    """Writes that these jobs are asked for, too, by what is not a file that may change."""
    job_files = _known_job_files(output_dir)
    ids = dict.fromkeys([*job_files.get(source, []), *(job.id for job in jobs)])
    _write(output_dir, job_files | {source: list(ids)})


def _known_job_files(output_dir: Path) -> dict[str, list[str]]:
    try:
        return _read_job_files(output_dir)
    except InputError as error:
        print(f"warning: writing {BATCH_FILE} anew: {error}")
        return {}


def _write(output_dir: Path, job_files: dict[str, list[str]]) -> None:
    write_json(output_dir / BATCH_FILE, {"job_files": job_files})


def find_superseded(output_dir: Path, states: Sequence[JobState]) -> set[str]:
    """Finds the jobs that no job file asks for and whose line or name another job has taken.

    Returns:
        Ids. Empty for a folder without `batch.json`, where nothing is known.

    Raises:
        InputError: `batch.json` is damaged.
    """
    current = {id_ for ids in _read_job_files(output_dir).values() for id_ in ids}
    taken = {key for s in states if s.job.id in current for key in (s.job.line, s.job.name)}
    return {
        state.job.id
        for state in states
        if state.job.id not in current
        and state.job.accepted is None  # a server's requests have no line
        and not taken.isdisjoint((state.job.line, state.job.name))
    }


def _read_job_files(output_dir: Path) -> dict[str, list[str]]:
    """The ids by the name of the job file; none if `batch.json` was never written."""
    path = output_dir / BATCH_FILE
    try:
        job_files = read_object(path)["job_files"]
        if not isinstance(job_files, dict):
            raise TypeError("job_files is not an object")
        return {str(name): [str(id_) for id_ in ids] for name, ids in job_files.items()}
    except FileNotFoundError:
        return {}
    except (TypeError, KeyError) as error:
        raise InputError(f"{path} does not list job files: {error!r}") from error
