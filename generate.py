#!/usr/bin/env python3
"""The three stages in one process: a prompt to a video."""

import argparse

import utils
from runtime.exit_codes import run_script
from stages import decode, denoise, encode, generate


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = utils.ArgumentParser(
        "Generates a video: text encoder, transformer and VAE decoder, one after the other.",
        '  python generate.py --prompt "A panda plays guitar in a bamboo forest"\n'
        '  python generate.py --prompt "A red kite" --seed 7 --output_video kite.mp4',
    )
    utils.add_prompt(parser)
    utils.add_text(parser)
    utils.add_denoising(parser)
    utils.add_profile(parser)
    utils.add_output_video(parser)
    utils.add_video(parser)
    utils.add_decoder(parser)
    utils.add_model(parser, default=utils.DEFAULT_MODEL)
    utils.add_mesh(parser)
    utils.add_distributed(parser)
    utils.add_platform(parser)
    utils.add_dtype(parser)
    utils.add_executables(parser)
    utils.add_output_dir(parser)
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    utils.choose_platform(arguments)
    utils.join_processes(arguments)
    utils.copy_trusted_executables(arguments)
    folder = arguments.output_dir
    generate.run(
        utils.options(encode.EncodeOptions, arguments),
        utils.options(denoise.DenoiseOptions, arguments, input_dir=folder),
        utils.options(decode.DecodeOptions, arguments, input_dir=folder),
    )


if __name__ == "__main__":
    run_script(lambda: run(parse_arguments()))
