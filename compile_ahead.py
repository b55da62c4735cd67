#!/usr/bin/env python3
"""Compiles the stages' programs before they are needed, for this machine or a TPU elsewhere.

Writes executables and their manifests into a folder that the stages read with --executables. With
--plan it writes nothing and prints the memory and time of each size and mesh.
"""

import argparse
import contextlib
import json
import sys

import utils
from command_line.condition import add_encoder
from runtime.errors import InputError, checking_input
from runtime.exit_codes import run_script
from stages import ahead
from stages.speed import SPEEDS


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = utils.ArgumentParser(
        "Compiles the stages ahead of time. Needs the model's JSON files, no weights, and for "
        "a TPU topology no TPU.",
        "  python compile_ahead.py --topology v6e-8 --sizes 768x1360x81 --executables executables\n"
        "  python compile_ahead.py --topology v6e-8 --sizes 768x1360x81 --plan\n"
        "  python compile_ahead.py --pull hf://me/cogvideox-v6e-8 --executables executables\n"
        "  python compile_ahead.py --push gs://bucket/executables --executables executables",
    )
    utils.add_model(parser, default=utils.DEFAULT_MODEL)
    parser.add_argument(
        "--stages",
        type=_stages,
        default="2,3",
        help="which to compile, separated by commas; 1 is the encoder of --encode_on devices, for "
        "an image or, if the model takes videos, for a video of as many frames",
    )
    utils.add_decoder(parser)
    add_encoder(parser)
    parser.add_argument(
        "--sizes",
        type=_sizes,
        help="height x width x frames, several separated by commas (default: the model's)",
    )
    parser.add_argument(
        "--topology", choices=ahead.TOPOLOGIES, default=ahead.LOCAL, help="machine to compile for"
    )
    utils.add_mesh(parser)
    utils.add_platform(parser)
    utils.add_dtype(parser)
    utils.add_attention(parser)
    parser.add_argument("--batch", type=utils.integer(1), default=1, help="prompts at once")
    parser.add_argument("--unguided", action="store_true", help="for --guidance_scale 1 or less")
    parser.add_argument("--max_sequence_length", type=utils.integer(1, 4096), help="as in stage 1")
    parser.add_argument(
        "--speed",
        type=_speeds,
        default="exact",
        help="compile what these values of stage 2's --speed need, separated by commas; all but "
        "exact are lossy. near covers every step mask, fast those with sparse attention. --plan "
        "shows all",
    )
    parser.add_argument(
        "--frames",
        choices=("uint8", "float32"),
        default="uint8",
        help="what stage 3 returns; float32 is for --output_video NAME.npy",
    )
    utils.add_allow_unsupported(parser)
    utils.add_executables(parser)
    parser.add_argument(
        "--pull",
        metavar="SOURCE",
        help="first copy artifacts from a folder, bucket or hf://owner/repository (artifacts are "
        "code: name --trust_executables, or trust all who can write there); without --sizes, "
        "compile nothing",
    )
    parser.add_argument(
        "--push",
        metavar="DESTINATION",
        help="at the end copy all artifacts there; without --sizes, compile nothing",
    )
    parser.add_argument("--plan", action="store_true", help="report memory and time; write nothing")
    parser.add_argument(
        "--compile_all",
        action="store_true",
        help="with --plan, compile every mesh of every size; by default one mesh per size and the "
        "decoder of one size are compiled, and the others are derived from them",
    )
    parser.add_argument("--json", action="store_true", help="with --plan, print JSON")
    return parser.parse_args(argv)


def _stages(text: str) -> tuple[int, ...]:
    stages = tuple(sorted({int(part) for part in text.split(",") if part in ("1", "2", "3")}))
    if not stages or len(stages) != len(text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} does not name some of 1, 2 and 3, such as 2,3")
    return stages


def _speeds(text: str) -> tuple[str, ...]:
    speeds = tuple(text.split(","))
    unknown = [speed for speed in speeds if speed not in SPEEDS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(SPEEDS)}")
    return speeds


def _sizes(text: str) -> list[tuple[int, int, int]]:
    sizes = [tuple(part.split("x")) for part in text.split(",")]
    if not all(len(size) == 3 and all(n.isdecimal() for n in size) for size in sizes):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not height x width x frames, such as 768x1360x81,720x1280x81"
        )
    return [(int(height), int(width), int(frames)) for height, width, frames in sizes]


def run(arguments: argparse.Namespace) -> None:
    if arguments.platform and arguments.topology != ahead.LOCAL:
        raise InputError("--platform is for this machine; leave it out with --topology")
    utils.choose_platform(arguments)
    options = utils.options(ahead.AheadOptions, arguments)
    if arguments.plan:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the plan
            with checking_input():
                if arguments.pull or arguments.push:
                    raise ValueError("--plan writes nothing; leave --pull and --push out")
                if 1 in options.stages:
                    raise ValueError("--plan is of stages 2 and 3; leave 1 out of --stages")
                targets = ahead.make_targets(options)
            plans = ahead.plan_sizes(options, targets)
        from stages.plan import table

        print(json.dumps(plans, indent=2) if arguments.json else table(plans))
        return
    with checking_input():
        if arguments.json or arguments.compile_all:
            raise ValueError("--json and --compile_all are for --plan")
        if arguments.trust_executables and not arguments.pull:
            raise ValueError("--trust_executables is for the source of --pull")
        moves_only = arguments.sizes is None and (arguments.pull or arguments.push)
        push_only = moves_only and not arguments.pull
        folder = ahead.check_folder(options, utils.EXECUTABLES_VARIABLE, push_only=push_only)
        targets = [] if moves_only else ahead.make_targets(options)
    ahead.compile_sizes(options, folder, targets)


if __name__ == "__main__":
    run_script(lambda: run(parse_arguments()))
