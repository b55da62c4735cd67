#!/usr/bin/env python3
"""Stage 1: prompts to T5 embeddings, on the CPU.

Writes stage1_embeddings.safetensors and generation_config.json.
"""

import argparse

import utils
from runtime.exit_codes import run_script
from stages import encode


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = utils.ArgumentParser(
        "Encodes a prompt with the model's T5 encoder, on the CPU.",
        '  python stage1_text_encoder.py --prompt "A panda plays guitar in a bamboo forest"\n'
        '  python stage1_text_encoder.py --prompt "A red kite" --negative_prompt "blurry" \\\n'
        "      --model_id ./my-cogvideox --output_dir runs/kite",
    )
    utils.add_prompt(parser)
    utils.add_text(parser)
    utils.add_allow_unsupported(parser)
    utils.add_model(parser, default=utils.DEFAULT_MODEL)
    utils.add_dtype(parser)
    utils.add_output_dir(parser)
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    encode.run(utils.options(encode.EncodeOptions, arguments))


if __name__ == "__main__":
    run_script(lambda: run(parse_arguments()))
