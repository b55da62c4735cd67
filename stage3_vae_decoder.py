#!/usr/bin/env python3
"""Stage 3: latents to video, with diffusers' VAE decoder through TorchAx.

Reads stage2_latents.safetensors; writes the video and a contact sheet beside it.
"""

import argparse
from pathlib import Path

import utils
from runtime.exit_codes import run_script
from stages import decode


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = utils.ArgumentParser(
        "Decodes the latents of stage 2, their width split over all devices of this machine.",
        "  python stage3_vae_decoder.py\n"
        "  python stage3_vae_decoder.py --output_video frames/   # a folder of PNG images\n"
        "  python stage3_vae_decoder_flax.py --output_video video.webp --quality 9",
    )
    parser.add_argument(
        "--input_dir", type=Path, default=utils.DEFAULT_FOLDER, help="folder of stage 2's files"
    )
    utils.add_model(parser, default=None)
    utils.add_output_video(parser)
    utils.add_video(parser)
    utils.add_mesh(parser, ("dp", "tp"))
    utils.add_distributed(parser)
    parser.add_argument("--fps", type=utils.integer(1, 240), help="default: the one of stage 2")
    utils.add_platform(parser)
    utils.add_dtype(parser)
    utils.add_executables(parser)
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace, decoder: str = "torchax") -> None:
    """Decodes with `decoder`, "torchax" or "flax"."""
    utils.choose_platform(arguments)
    utils.join_processes(arguments)
    utils.copy_trusted_executables(arguments)
    decode.run(utils.options(decode.DecodeOptions, arguments, decoder=decoder))


if __name__ == "__main__":
    run_script(lambda: run(parse_arguments()))
