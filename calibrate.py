#!/usr/bin/env python3
"""Measures what a model needs for the options of stage 2, and writes it as JSON.

Which denoising steps it can skip (calibration.json), or with --preview how its latents become the
colours of previews (preview_factors.json).
"""

import argparse
from pathlib import Path

import utils
from runtime.exit_codes import run_script
from stages import calibrate


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = utils.ArgumentParser(
        "Calibrates step masks for one model, size, number of steps and scheduler: runs the exact "
        "model, and again from each later step on with a few steps skipped before it. A killed "
        "calibration resumes.",
        "  python calibrate.py\n"
        "  python calibrate.py --num_inference_steps 50 --compute 29,24,20 --plot masks.png\n"
        "  python stage2_transformer.py --step_mask stage_outputs/calibration.json\n"
        "  python calibrate.py --preview night/*/ --output_dir night\n"
        "  python calibrate.py --block_rules --output_dir night\n"
        "  python stage2_transformer.py --preview_every 5 --preview_factors "
        "night/preview_factors.json",
    )
    utils.add_model(parser, default=utils.DEFAULT_MODEL)
    parser.add_argument(
        "--prompts",
        type=Path,
        help="file with a prompt a line; one is enough (default: a prompt of its own)",
    )
    parser.add_argument(
        "--preview",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        help="instead of that, fit the colours of previews to the latents and videos in these "
        "folders; a dozen different videos are enough",
    )
    utils.add_text(parser)
    parser.add_argument(
        "--compute",
        metavar="STEPS",
        type=_numbers,
        help="how many steps the masks compute, separated by commas (default: 58%% and 48%%)",
    )
    parser.add_argument(
        "--block_rules",
        action="store_true",
        help="instead of that, find the sparsest rule of attention that each head bears, for "
        "--sparse_attention (block_rules.json)",
    )
    parser.add_argument(
        "--block_alpha",
        type=utils.number(0, 1),
        default=0.05,
        help="with --block_rules: the largest relative error of a head's output",
    )
    parser.add_argument("--plot", type=Path, help="PNG to draw the ratios and the masks into")
    utils.add_sampling(parser)
    utils.add_allow_unsupported(parser)
    utils.add_attention(parser)
    utils.add_output_dir(parser)
    utils.add_mesh(parser)
    utils.add_platform(parser)
    utils.add_dtype(parser)
    utils.add_executables(parser)
    return parser.parse_args(argv)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(utils.integer(1)(part) for part in text.split(","))


def run(arguments: argparse.Namespace) -> None:
    if arguments.preview:
        from stages import calibrate_preview

        options = utils.options(calibrate_preview.CalibratePreviewOptions, arguments, model_id=None)
        calibrate_preview.run(options)
        return
    utils.choose_platform(arguments)
    utils.copy_trusted_executables(arguments)
    options = utils.options(calibrate.CalibrateOptions, arguments)
    if arguments.block_rules:
        from stages import calibrate_blocks

        calibrate_blocks.run(options, arguments.block_alpha)
    else:
        calibrate.run(options)


if __name__ == "__main__":
    run_script(lambda: run(parse_arguments()))
