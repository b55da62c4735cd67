#!/usr/bin/env python3
"""The three stages in one process: a prompt to a video."""

from __future__ import annotations

import argparse
from pathlib import Path

import stage1_text_encoder as stage1
import stage2_transformer as stage2
import stage3_vae_decoder as stage3
import utils
from runtime import processes
from runtime.errors import checking_input
from utils import ArgumentParser


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        "Generates a video: text encoder, transformer and VAE decoder, one after the other.",
        '  python generate.py --prompt "A panda plays guitar in a bamboo forest"\n'
        '  python generate.py --prompt "A red kite" --seed 7 --output_video kite.mp4',
    )
    stage1.add_prompt(parser)
    stage1.add_arguments(parser)
    stage2.add_arguments(parser)
    stage2.add_profile(parser)
    stage3.add_output(parser)
    stage3.add_arguments(parser)
    stage3.add_decoder(parser)
    utils.add_model(parser, default=utils.DEFAULT_MODEL)
    utils.add_mesh(parser)
    utils.add_distributed(parser)
    utils.add_dtype(parser)
    utils.add_executables(parser)
    parser.add_argument(
        "--output_dir", type=Path, default=utils.DEFAULT_FOLDER, help="folder for the stage files"
    )
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    run_stages(arguments, arguments, arguments, arguments.decoder)


def run_stages(
    first: argparse.Namespace,
    second: argparse.Namespace,
    third: argparse.Namespace,
    decoder: str,
) -> None:
    """Runs the stages with the arguments of each, in the output folder of the first.

    Args:
        decoder: "torchax" or "flax".
    """
    utils.join_processes(second)
    # What stages 2 and 3 would refuse is refused before stage 1 loads its 9.5 GB.
    with checking_input():
        utils.check_executables(second.executables)
        model, tokens = stage1.check(first)
        plan = stage2.make_plan(second, model, len(first.prompt), tokens)
        batch, frames, *shape = plan.denoiser.latents.sizes
        latents = (batch, shape[0], frames - plan.padding_frames, *shape[1:])
        stage3.check(third, model, first.output_dir, latents, third.fps or plan.settings.fps)

    if processes.is_first():
        with processes.alone():
            stage1.run(first)
    second.input_dir = third.input_dir = first.output_dir
    stage2.run(second)
    stage3.run(third, f"vae_{decoder}")


if __name__ == "__main__":
    utils.run_main(lambda: run(parse_arguments()))
