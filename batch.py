#!/usr/bin/env python3
"""Many videos: checks every job first, makes nothing twice, and loses nothing when killed.

batch.py JOBS --output_dir DIR     make them; the same command resumes
batch.py status DIR                a table of what is done
batch.py prune DIR --yes           delete the folders of jobs whose line has changed
batch.py rerun VIDEO               reproduce a video from its own tag or the settings beside it
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import utils
from command_line.engine import add_engine
from jobs.claims import DEFAULT_EXPIRY
from jobs.jobfile import LineSettings
from runtime.errors import InputError
from runtime.exit_codes import FAILED_JOBS, run_script
from stages.files import CONFIG_FILE
from stages.sections import STAGES


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = utils.ArgumentParser(
        "Makes a video of every line of a file. The same command resumes where the last one\n"
        "ended; several at once on one folder share the work. Exit code 3: some jobs failed.",
        "  python batch.py prompts.txt --output_dir night --checkpoint_every 10\n"
        "  python batch.py jobs.jsonl --output_dir night --dry_run\n"
        "  python batch.py jobs.jsonl --output_dir night --stages 1,2   # decode some later:\n"
        "  python batch.py jobs.jsonl --output_dir night --only 'kite*'\n"
        "  python batch.py status night\n"
        "  python batch.py rerun night/kite-0123456789ab/output_video.mp4\n\n"
        "a line of jobs.jsonl; every key but prompt is optional, the options are the defaults:\n"
        '  {"prompt": "A red kite", "name": "kite", "seeds": "1-4", "size": "768x1360",\n'
        '   "num_frames": 81, "num_inference_steps": 50, "guidance_scale": 6}',
    )
    parser.add_argument(
        "jobs", type=Path, help="JSON lines if it ends in .jsonl, else a prompt a line, # comments"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="holds one folder per job")
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
        default=DEFAULT_EXPIRY,
        help="seconds after which others take over the job of a process on a lost machine",
    )
    parser.add_argument(
        "--mirror",
        metavar="URL",
        help="keep a copy there, and fetch missing files from there: gs://bucket/night, or any "
        "other URL that fsspec knows",
    )
    add_engine(parser)
    parser.add_argument(
        "--inputs_dir",
        type=Path,
        help="folder that the images and videos of the jobs must lie in (default: that of the job "
        "file, to which their paths are relative)",
    )
    utils.add_text(parser)
    utils.add_denoising(parser)
    utils.add_video(parser)
    utils.add_decoder(parser)
    utils.add_model(parser, default=utils.DEFAULT_MODEL)
    utils.add_mesh(parser)
    utils.add_dtype(parser)
    utils.add_platform(parser)
    utils.add_executables(parser)
    return parser.parse_args(argv)


def _stages(text: str) -> tuple[str, ...]:
    numbers = text.split(",")
    if not set(numbers) <= {"1", "2", "3"} or numbers != sorted(set(numbers)):
        raise argparse.ArgumentTypeError(f"{text!r} is not 1, 2 and 3 or some of them, in order")
    return tuple(STAGES[int(number) - 1] for number in numbers)


def run(arguments: argparse.Namespace) -> None:
    from jobs import batch
    from jobs.options import BatchOptions

    if arguments.engine == "local" or arguments.dry_run:  # Ray's workers do it on their machines
        utils.choose_platform(arguments)
        utils.copy_trusted_executables(arguments)
    parse = utils.line_parser(LineSettings, arguments)
    counts = batch.run(utils.options(BatchOptions, arguments), parse)
    if counts and counts.failed:
        sys.exit(FAILED_JOBS)


def parse_status(argv: list[str] | None = None) -> argparse.Namespace:
    parser = utils.ArgumentParser(
        "Shows the status of every job in a batch's folder.", "  python batch.py status night"
    )
    parser.prog += " status"
    parser.add_argument("folder", type=Path, help="a batch's --output_dir")
    return parser.parse_args(argv)


def status(arguments: argparse.Namespace) -> None:
    from jobs.records import read_batch, warn
    from jobs.status import table
    from jobs.superseded import find_superseded

    states = read_batch(arguments.folder)
    try:
        superseded = find_superseded(arguments.folder, states)
    except InputError as error:
        warn(f"superseded jobs are not marked: {error}")
        superseded = set()
    print(table(states, superseded))


def parse_prune(argv: list[str] | None = None) -> argparse.Namespace:
    parser = utils.ArgumentParser(
        "Deletes the folders of superseded jobs: those whose line of the job file has changed.\n"
        "Files of others stay. So do jobs that a process works on.",
        "  python batch.py prune night --dry_run\n  python batch.py prune night --yes",
    )
    parser.prog += " prune"
    parser.add_argument("folder", type=Path, help="a batch's --output_dir")
    parser.add_argument("--dry_run", action="store_true", help="list them and end")
    parser.add_argument("--yes", action="store_true", help="delete; without it nothing is deleted")
    parser.add_argument(
        "--mirror", metavar="URL", help="delete their copies there, too (default: those stay)"
    )
    return parser.parse_args(argv)


def prune(arguments: argparse.Namespace) -> None:
    from jobs import prune

    prune.run(utils.options(prune.PruneOptions, arguments))


def parse_rerun(argv: list[str] | None = None) -> argparse.Namespace:
    parser = utils.ArgumentParser(
        "Reproduces a video with the prompt, seed and settings from its mp4 tag, or from\n"
        f"{CONFIG_FILE} in its folder.",
        "  python batch.py rerun night/kite-0123456789ab/output_video.mp4\n"
        "  python batch.py rerun kite.mp4 --model_id ./moved-model --output_dir again",
    )
    parser.prog += " rerun"
    parser.add_argument("video", type=Path, help="any video of this project")
    parser.add_argument(
        "--output_dir", type=Path, help="a new folder (default: VIDEO_rerun beside the video)"
    )
    parser.add_argument(
        "--input",
        type=Path,
        help="the image or video that the video started from, if it has moved; its sha256 is "
        "compared",
    )
    utils.add_model(parser, default=None)
    parser.add_argument(
        "--lora",
        action="append",
        metavar="PATH",
        help="file, or folder, of the LoRA that made the video, if it has moved; repeatable",
    )
    utils.add_mesh(parser)
    utils.add_platform(parser)
    utils.add_executables(parser)
    return parser.parse_args(argv)


def rerun(arguments: argparse.Namespace) -> None:
    from jobs import rerun

    utils.choose_platform(arguments)
    utils.copy_trusted_executables(arguments)
    rerun.run(utils.options(rerun.RerunOptions, arguments))


def main() -> None:
    if sys.argv[1:2] == ["status"]:
        status(parse_status(sys.argv[2:]))
    elif sys.argv[1:2] == ["prune"]:
        prune(parse_prune(sys.argv[2:]))
    elif sys.argv[1:2] == ["rerun"]:
        rerun(parse_rerun(sys.argv[2:]))
    else:
        run(parse_arguments())


if __name__ == "__main__":
    run_script(main)
