#!/usr/bin/env python3
"""A server of videos with OpenAI's /v1/videos and a page.

serve.py --output_dir DIR           accepts requests; a worker process makes the videos
serve.py worker --output_dir DIR    one more worker on the same folder, here or elsewhere
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import utils
from command_line.engine import add_engine
from command_line.parser import ArgumentParser, integer
from jobs.jobfile import LineSettings
from runtime.exit_codes import run_script
from stages.sections import STAGES

_CHECKPOINT_EVERY, _PREVIEW_EVERY = 10, 5


def _add_common(parser: ArgumentParser) -> None:
    parser.add_argument("--output_dir", type=Path, required=True, help="holds a folder per video")
    utils.add_text(parser)
    utils.add_denoising(parser)
    utils.add_video(parser)
    utils.add_decoder(parser)
    utils.add_model(parser, default=utils.DEFAULT_MODEL)
    utils.add_mesh(parser)
    utils.add_dtype(parser)
    utils.add_platform(parser)
    utils.add_executables(parser)
    add_engine(parser)
    parser.set_defaults(checkpoint_every=_CHECKPOINT_EVERY, preview_every=_PREVIEW_EVERY)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        "Serves OpenAI's /v1/videos and a page. Requests are kept in the folder before they are\n"
        "answered, so a killed server goes on where it was. Settings of a video are the defaults\n"
        "of requests that leave them out.",
        "  python serve.py --output_dir served\n"
        "  python serve.py --output_dir served --host 0.0.0.0 --api_key_file key.txt\n"
        "  python serve.py --output_dir served --no_worker      # videos are made by:\n"
        "  python serve.py worker --output_dir served",
    )
    parser.add_argument("--host", default="127.0.0.1", help="127.0.0.1 is for this machine only")
    parser.add_argument("--port", type=integer(0, 65535), default=8000, help="0: any free")
    parser.add_argument(
        "--api_key_file",
        type=Path,
        help="file whose first line every client must send as its key (default: no key)",
    )
    parser.add_argument(
        "--allow_anyone", action="store_true", help="listen to other machines without a key"
    )
    parser.add_argument(
        "--max_queue",
        type=integer(1, 100_000),
        default=64,
        help="requests that may wait; more are refused with 429",
    )
    parser.add_argument(
        "--lora_dir",
        type=Path,
        help="folder of LoRA files (*.safetensors) that requests may name, without the suffix",
    )
    parser.add_argument(
        "--no_worker", action="store_true", help="only accept; other processes make the videos"
    )
    _add_common(parser)
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace, words: list[str]) -> None:
    from web import server

    parse = utils.line_parser(LineSettings, arguments)
    # The worker ignores what only the server needs, so both take the same command line.
    command = [sys.executable, __file__, "worker", "--with_server", *words]
    server.run(utils.options(server.ServeOptions, arguments), parse, command)


def parse_worker(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        "Makes the videos that servers accept into a folder, until it is stopped.",
        "  python serve.py worker --output_dir served\n"
        "  python serve.py worker --output_dir served --engine ray",
    )
    parser.prog += " worker"
    _add_common(parser)
    return parser.parse_args(argv)


def work(arguments: argparse.Namespace, with_server: bool) -> None:
    from jobs import serving
    from jobs.options import BatchOptions

    if arguments.engine == "local":  # Ray's workers do it on their machines
        utils.choose_platform(arguments)
        utils.copy_trusted_executables(arguments)
    options = utils.options(BatchOptions, arguments, jobs=None, stages=STAGES)
    serving.run(options, sys.stdin if with_server else None)


def main() -> None:
    words = sys.argv[1:]
    if words[:2] == ["worker", "--with_server"]:
        work(parse_arguments(words[2:]), with_server=True)
    elif words[:1] == ["worker"]:
        work(parse_worker(words[1:]), with_server=False)
    else:
        run(parse_arguments(words), words)


if __name__ == "__main__":
    run_script(main)
