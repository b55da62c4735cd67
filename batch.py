#!/usr/bin/env python3
"""Many videos: every job checked before any work, nothing done twice, nothing lost when killed.

batch.py JOBS --output_dir DIR     make them; the same command again goes on
batch.py status DIR                a table of what is done
batch.py rerun VIDEO               a video again, from its own tag or the settings beside it
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import stage1_text_encoder as stage1
import stage2_transformer as stage2
import stage3_vae_decoder as stage3
import utils
from jobs import claims
from jobs.jobfile import read_job_file
from runtime.errors import InputError, Stopped, checking_input
from stages import files as stage_files
from utils import ArgumentParser

if TYPE_CHECKING:
    from cogvideox.model.folder import ModelFolder
    from jobs.records import Job
    from jobs.runner import Ledger

_FAILED_JOBS = 3  # exit code
_SHOWN_PROBLEMS = 100
_STAGES = (stage1.STAGE, stage2.STAGE, stage3.STAGE)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        "Makes a video of every line of a file. The same command again goes on where the last one\n"
        "ended; several at once on one folder share the work. Exit code 3: some jobs failed.",
        "  python batch.py prompts.txt --output_dir night --checkpoint_every 10\n"
        "  python batch.py jobs.jsonl --output_dir night --dry_run\n"
        "  python batch.py jobs.jsonl --output_dir night --stages 1,2   # decode some later:\n"
        "  python batch.py jobs.jsonl --output_dir night --only 'kite*'\n"
        "  python batch.py status night\n"
        "  python batch.py rerun night/kite-0123456789ab/output_video.mp4\n\n"
        "a line of jobs.jsonl, every key but prompt optional, with the options as defaults:\n"
        '  {"prompt": "A red kite", "name": "kite", "seeds": "1-4", "size": "768x1360",\n'
        '   "num_frames": 81, "num_inference_steps": 50, "guidance_scale": 6}',
    )
    parser.add_argument(
        "jobs", type=Path, help="JSON lines if it ends in .jsonl, else a prompt a line, # comments"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="one folder a job goes here")
    parser.add_argument("--dry_run", action="store_true", help="check, show the plan, and end")
    parser.add_argument(
        "--stages", type=_stages, default="1,2,3", help="1,2 keeps latents to decode later"
    )
    parser.add_argument(
        "--only", action="append", help="jobs by name, folder or id, * and ? allowed; repeatable"
    )
    parser.add_argument("--retry_failed", action="store_true", help="try failed jobs again")
    parser.add_argument(
        "--claim_expiry",
        type=utils.number(1, 86400),
        default=claims.DEFAULT_EXPIRY,
        help="seconds after which the job of a process on a lost machine is taken over",
    )
    parser.add_argument(
        "--mirror",
        metavar="URL",
        help="keep a copy there and fetch from there what is missing here: gs://bucket/night, or "
        "any other URL that fsspec knows",
    )
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="local works in this process; ray on every machine of a Ray cluster",
    )
    parser.add_argument(
        "--workers_per_node",
        type=utils.integer(1),
        default=1,
        help="of --engine ray; they share the machine's accelerators",
    )
    for stage in (stage1, stage2, stage3):
        stage.add_arguments(parser)
    stage3.add_decoder(parser)
    utils.add_model(parser, default=utils.DEFAULT_MODEL)
    utils.add_mesh(parser)
    utils.add_dtype(parser)
    utils.add_executables(parser)
    return parser.parse_args(argv)


def _stages(text: str) -> tuple[str, ...]:
    numbers = text.split(",")
    if not set(numbers) <= {"1", "2", "3"} or numbers != sorted(set(numbers)):
        raise argparse.ArgumentTypeError(f"{text!r} is not 1, 2 and 3 or some of them, in order")
    return tuple(_STAGES[int(number) - 1] for number in numbers)


def run(arguments: argparse.Namespace) -> None:
    """Checks every job, then makes what is missing.

    Raises:
        SystemExit: with code 3 if jobs failed.
        Stopped: a signal came; what ran was finished or saved first.
    """
    with checking_input():
        model, every_job = _read_jobs(arguments)
        jobs = _select(every_job, arguments.only)

        from jobs.estimate import describe, job_bytes
        from jobs.records import read_batch, write_job
        from jobs.runner import Runner
        from jobs.superseded import write_job_ids

        stop = threading.Event()
        runner = Runner(jobs, model, arguments, stop)
        if not arguments.dry_run:
            runner.fetch()
        needs = {job: runner.ledger.next(job) for job in jobs}
        _require_stages_before(jobs, arguments.stages[0], runner.ledger)
        bytes_needed = sum(job_bytes(job, model) for job in jobs if needs[job] in _STAGES)
        stage_files.check_output_folder(arguments.output_dir, needed_bytes=bytes_needed + (1 << 30))
        if arguments.engine == "local" or arguments.dry_run:
            runner.check()
        if arguments.dry_run:
            states = read_batch(arguments.output_dir) if arguments.output_dir.exists() else []
            print(describe(jobs, needs, states, model, runner.mesh))
            return

    for job in jobs:
        write_job(arguments.output_dir / job.folder, job)
    write_job_ids(arguments.output_dir, arguments.jobs, every_job)
    if arguments.engine == "ray":
        from jobs import ray_engine

        ray_engine.connect()
        signals = _stop_on_signals(stop)
        counts = ray_engine.run(jobs, arguments, stop)
    else:
        signals = _stop_on_signals(stop)
        counts = runner.run()
    runner.copy()
    print(f"{counts.done} done, {counts.failed} failed, {counts.left} left")
    if signals:
        raise Stopped(signals[0])
    if counts.failed:
        sys.exit(_FAILED_JOBS)


def _read_jobs(arguments: argparse.Namespace) -> tuple[ModelFolder, list[Job]]:
    """All jobs of the file.

    Raises:
        InputError: some are wrong; every problem is printed first.
    """
    lines, problems = read_job_file(arguments.jobs, arguments)

    from cogvideox.model.folder import find_model
    from jobs.identity import make_jobs

    parts = ["tokenizer", "text_encoder", "transformer", "scheduler", "vae"]
    model = find_model(arguments.model_id, parts)
    jobs, more = make_jobs(lines, model)
    problems = sorted(problems + more)
    for number, problem in problems[:_SHOWN_PROBLEMS]:
        print(f"{arguments.jobs}:{number}: {' '.join(problem.split())}", file=sys.stderr)
    if problems:
        wrong = len({number for number, _ in problems})
        raise InputError(f"{wrong} line(s) of {arguments.jobs} are wrong; nothing was done")
    return model, jobs


def _select(jobs: Sequence[Job], patterns: list[str] | None) -> list[Job]:
    """The jobs that `--only` asks for."""
    if patterns is None:
        return list(jobs)
    chosen: set[Job] = set()
    for pattern in patterns:
        names = ((job, (job.name, job.folder, job.id)) for job in jobs)
        found = {j for j, own in names if any(fnmatch.fnmatchcase(n, pattern) for n in own)}
        if not found:
            raise ValueError(f"--only {pattern} names no job of this file")
        chosen |= found
    return [job for job in jobs if job in chosen]


def _require_stages_before(jobs: Sequence[Job], first: str, ledger: Ledger) -> None:
    """Raises ValueError for a job that lacks the files of the stages before the `first` wanted."""
    before = _STAGES[: _STAGES.index(first)]
    lacking = [job for job in jobs if ledger.lacks(job, before)]
    if lacking:
        raise ValueError(
            f"--stages: {len(lacking)} job(s) lack what the stages before make, such as "
            f"{lacking[0].folder} (line {lacking[0].line}); make it first, or choose with --only"
        )


def _stop_on_signals(stop: threading.Event) -> list[int]:
    """The first signal sets `stop`, the next one ends at once; returns those that came."""
    came: list[int] = []

    def on_signal(number: int, _: object) -> None:
        came.append(number)
        if len(came) > 1:
            raise Stopped(number)
        # Not print: the signal may have come inside one, which must not be entered twice.
        os.write(2, b"stopping; what runs is finished or saved first, once more ends at once\n")
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    return came


def parse_status(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        "Shows what became of every job in a batch's folder.", "  python batch.py status night"
    )
    parser.prog += " status"
    parser.add_argument("folder", type=Path, help="a batch's --output_dir")
    return parser.parse_args(argv)


def status(arguments: argparse.Namespace) -> None:
    from jobs.records import read_batch
    from jobs.status import table
    from jobs.superseded import find_superseded

    states = read_batch(arguments.folder)
    print(table(states, find_superseded(arguments.folder, states)))


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)  # progress is for a log file, too
    if sys.argv[1:2] == ["status"]:
        status(parse_status(sys.argv[2:]))
    elif sys.argv[1:2] == ["rerun"]:
        from jobs import rerun

        rerun.run(rerun.parse_arguments(sys.argv[2:]))
    else:
        run(parse_arguments())


if __name__ == "__main__":
    utils.run_main(main)
