#!/usr/bin/env python3
"""Stage 2: embeddings to latents, the denoising loop of the transformer.

Reads stage1_embeddings.safetensors, writes stage2_latents.safetensors.
"""

import argparse
from pathlib import Path

import utils
from runtime.exit_codes import run_script
from stages import denoise


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = utils.ArgumentParser(
        "Denoises latents from the embeddings of stage 1, on all devices of this machine.",
        "  python stage2_transformer.py\n"
        "  python stage2_transformer.py --num_inference_steps 30 --guidance_scale 7 --seed 1\n"
        "  python stage2_transformer.py --height 720 --width 1280 --dp 2 --tp 4",
    )
    parser.add_argument(
        "--input_dir", type=Path, default=utils.DEFAULT_FOLDER, help="folder of stage 1's files"
    )
    parser.add_argument("--output_dir", type=Path, help="folder to write to (default: input_dir)")
    utils.add_model(parser, default=None)
    utils.add_denoising(parser)
    utils.add_profile(parser)
    utils.add_mesh(parser)
    utils.add_distributed(parser)
    utils.add_platform(parser)
    utils.add_dtype(parser)
    utils.add_executables(parser)
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    utils.choose_platform(arguments)
    utils.join_processes(arguments)
    utils.copy_trusted_executables(arguments)
    output_dir = arguments.output_dir or arguments.input_dir
    denoise.run(utils.options(denoise.DenoiseOptions, arguments, output_dir=output_dir))


if __name__ == "__main__":
    run_script(lambda: run(parse_arguments()))
