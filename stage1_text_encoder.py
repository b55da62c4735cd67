#!/usr/bin/env python3
"""Stage 1: prompts to T5 embeddings, on the CPU, and an image or video to latents.

Writes stage1_embeddings.safetensors, generation_config.json and, with an image or a video,
stage1_conditions.safetensors.
"""

import argparse

import utils
from command_line.condition import add_condition
from runtime.errors import InputError
from runtime.exit_codes import run_script
from stages import condition, encode


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = utils.ArgumentParser(
        "Encodes a prompt with the model's T5 encoder, on the CPU, and with the VAE the image or\n"
        "video that the run starts from.",
        '  python stage1_text_encoder.py --prompt "A panda plays guitar in a bamboo forest"\n'
        '  python stage1_text_encoder.py --prompt "A red kite" --negative_prompt "blurry" \\\n'
        "      --model_id ./my-cogvideox --output_dir runs/kite\n"
        '  python stage1_text_encoder.py --prompt "It rises" --image kite.jpg --size auto \\\n'
        "      --model_id zai-org/CogVideoX1.5-5B-I2V\n"
        '  python stage1_text_encoder.py --prompt "A blue kite" --video kite.mp4',
    )
    utils.add_prompt(parser)
    utils.add_text(parser)
    add_condition(parser)
    for side in ("height", "width"):
        parser.add_argument(
            f"--{side}", type=int, help="pixels of the image or video (default: the model's)"
        )
    utils.add_allow_unsupported(parser)
    utils.add_model(parser, default=utils.DEFAULT_MODEL)
    utils.add_dtype(parser)
    utils.add_output_dir(parser)
    utils.add_executables(parser)
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    utils.copy_trusted_executables(arguments)
    found = condition.options_of(vars(arguments))
    if found is None and (arguments.height or arguments.width):
        raise InputError("--height and --width of stage 1 are for --image or --video")
    encode.run(utils.options(encode.EncodeOptions, arguments, condition=found))


if __name__ == "__main__":
    run_script(lambda: run(parse_arguments()))
