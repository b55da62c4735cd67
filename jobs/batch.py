"""Runs a batch: checks every job, then makes what is missing."""

from __future__ import annotations

import fnmatch
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from cogvideox.model.folder import MODEL_PARTS, ModelFolder, find_model
from jobs.estimate import describe, job_bytes
from jobs.gallery import GALLERY_FILE
from jobs.identity import make_jobs
from jobs.jobfile import Parse, read_job_file, read_prompts
from jobs.ledger import CONFIG, DONE, FAILED, Counts, Ledger
from jobs.options import BatchOptions
from jobs.records import Job, read_batch, write_job
from jobs.runner import DISK_ERRORS, Runner
from jobs.superseded import add_job_ids, write_job_ids
from runtime.errors import InputError, RunError, Stopped, checking_input
from runtime.text import printable
from stages import files
from stages.sections import STAGES

_SHOWN_PROBLEMS = 100
_SPARE_BYTES = 1 << 30
_COMMAND_LINE = "generate.py"  # stands for a job file in batch.json


def run(options: BatchOptions, parse: Parse) -> Counts | None:
    """Checks every job, then makes what is missing; with `dry_run` prints the plan instead.

    Args:
        parse: checks the settings of a line of the job file.

    Returns:
        How many jobs are done, failed and left; None for a dry run.

    Raises:
        InputError: a job or an option is wrong; nothing was done.
        Stopped: a signal came; running work was finished or saved first.
    """
    with checking_input():
        model, every_job = read_jobs(options, parse)
        jobs = _select(every_job, options.only)
        stop = threading.Event()
        runner = Runner(jobs, model, options, stop)
        if not options.dry_run:
            runner.fetch()
        needs = {job: runner.ledger.next(job) for job in jobs}
        _require_earlier_stages(jobs, options.stages[0], runner.ledger)
        needed = sum(job_bytes(job, model) for job in jobs if needs[job] in STAGES)
        files.check_output_folder(options.output_dir, needed_bytes=needed + _SPARE_BYTES)
        if options.engine == "local" or options.dry_run:
            runner.check()
        if options.dry_run:
            states = read_batch(options.output_dir) if options.output_dir.exists() else []
            for job in jobs:
                print(_plan_line(job, needs[job], runner.ledger))
            print(describe(jobs, needs, states, model, runner.mesh))
            return None

    for job in jobs:
        _write_job(options.output_dir / job.folder, job, runner.ledger)
    if options.jobs:
        write_job_ids(options.output_dir, options.jobs.name, every_job)
    else:
        add_job_ids(options.output_dir, _COMMAND_LINE, every_job)
    if options.engine == "ray":
        from jobs import ray_engine

        ray_engine.connect()
        signals = _stop_on_signals(stop)  # after Ray, which installs handlers of its own
        counts = ray_engine.run(jobs, options, stop)
    else:
        signals = _stop_on_signals(stop)
        counts = runner.run()
    runner.copy()
    _name_failures(jobs, runner.ledger)
    if not options.jobs:
        for job in jobs:
            if runner.ledger.next(job) == DONE:
                video = options.output_dir / job.folder / files.VIDEO_FILE
                print(f"video: {video} (seed {job.settings.seed})")
    print(f"gallery: {options.output_dir / GALLERY_FILE}")
    print(f"{counts.done} done, {counts.failed} failed, {counts.left} left")
    if signals:
        raise Stopped(signals[0])
    return counts


def _write_job(folder: Path, job: Job, ledger: Ledger) -> None:
    """Writes job.json; the job fails if its folder cannot be written."""
    try:
        write_job(folder, job)
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise RunError(f"{folder} cannot be written: {error.strerror}") from error
        ledger.fail(job, f"job.json cannot be written: {error}")


def _plan_line(job: Job, need: str, ledger: Ledger) -> str:
    """One line of a dry run: a job and what will be done."""
    if need == DONE:
        plan = "done"
    elif need == FAILED:
        plan = f"failed; --retry_failed tries it again: {ledger.failure(job)}"
    elif need == CONFIG:
        plan = f"write {files.CONFIG_FILE} again"
    else:
        plan = f"run from {need}"
    return f"  {job.folder} (line {job.line}): {printable(plan)}"


def _name_failures(jobs: Sequence[Job], ledger: Ledger) -> None:
    """Prints the failed jobs, and how to try them again."""
    failed = [job for job in jobs if ledger.next(job) == FAILED]
    for job in failed[:_SHOWN_PROBLEMS]:
        print(f"failed: {job.folder} (line {job.line}): {printable(ledger.failure(job))}")
    if len(failed) > _SHOWN_PROBLEMS:
        print(f"and {len(failed) - _SHOWN_PROBLEMS} more failed job(s)")
    if failed:
        print("the same command with --retry_failed tries the failed job(s) again")


def read_jobs(options: BatchOptions, parse: Parse) -> tuple[ModelFolder, list[Job]]:
    """Reads all jobs of the job file, or of the command line's prompts.

    Raises:
        InputError: some are wrong; every problem is printed first.
    """
    if options.jobs:
        lines, problems = read_job_file(options.jobs, parse, options.seeds, options.inputs_dir)
    else:
        lines, problems = read_prompts(options.prompts, parse, options.seeds)
    model = find_model(options.model_id, MODEL_PARTS)
    jobs, more = make_jobs(lines, model)
    problems = sorted(problems + more)
    if problems and not options.jobs:
        number, problem = problems[0]
        raise InputError(f"--prompt {options.prompts[number - 1][:80]!r}: {problem}")
    for number, problem in problems[:_SHOWN_PROBLEMS]:
        line = f"{options.jobs}:{number}: {' '.join(problem.split())}"
        print(printable(line), file=sys.stderr)
    if problems:
        wrong = len({number for number, _ in problems})
        raise InputError(f"{wrong} line(s) of {options.jobs} are wrong; nothing was done")
    return model, jobs


def _select(jobs: Sequence[Job], patterns: Sequence[str] | None) -> list[Job]:
    """Selects the jobs that `--only` names.

    Raises:
        ValueError: a pattern matches no job.
    """
    if patterns is None:
        return list(jobs)
    chosen: set[Job] = set()
    for pattern in patterns:
        names = ((job, (job.name, job.folder, job.id)) for job in jobs)
        found = {j for j, own in names if any(fnmatch.fnmatchcase(n, pattern) for n in own)}
        if not found:
            raise ValueError(f"--only {pattern} matches no job of this file")
        chosen |= found
    return [job for job in jobs if job in chosen]


def _require_earlier_stages(jobs: Sequence[Job], first: str, ledger: Ledger) -> None:
    """Checks that the files of the stages before `first` are there.

    Raises:
        ValueError: a job lacks some.
    """
    before = STAGES[: STAGES.index(first)]
    lacking = [job for job in jobs if ledger.lacks(job, before)]
    if lacking:
        raise ValueError(
            f"--stages: {len(lacking)} job(s) lack the files of earlier stages, such as "
            f"{lacking[0].folder} (line {lacking[0].line}); run those stages first, or select "
            "other jobs with --only"
        )


def _stop_on_signals(stop: threading.Event) -> list[int]:
    """Makes the first signal set `stop` and the second one end the process at once.

    Returns:
        The signals that came, filled as they come.
    """
    came: list[int] = []

    def on_signal(number: int, _: object) -> None:
        came.append(number)
        if len(came) > 1:
            raise Stopped(number)
        # Not print: the signal may interrupt a print, which cannot be entered twice.
        os.write(2, b"stopping after the running work is finished or saved; again: stop at once\n")
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    return came
