#!/usr/bin/env python3
"""The three stages in one process: a prompt to a video, or several videos."""

import argparse
import sys
from pathlib import Path

import utils
from command_line.condition import add_condition
from jobs.jobfile import LineSettings, read_seeds, read_settings
from runtime.errors import InputError
from runtime.exit_codes import FAILED_JOBS, run_script
from stages import condition, decode, denoise, encode, generate
from stages.sections import STAGES


def make_parser(kind: type[utils.ArgumentParser] = utils.ArgumentParser) -> utils.ArgumentParser:
    parser = kind(
        "Generates a video: text encoder, transformer and VAE decoder, one after the other.\n"
        "With --seeds or --prompts_file it makes several, as batch.py does: each in a folder of\n"
        "its own, with a gallery; the same command resumes.",
        '  python generate.py --prompt "A panda plays guitar in a bamboo forest"\n'
        '  python generate.py --prompt "A red kite" --seed 7 --output_video kite.mp4\n'
        '  python generate.py --prompt "A red kite" --seeds 1-4 --output_dir kites\n'
        "  python generate.py --prompts_file prompts.txt --config night.json --output_dir night\n\n"
        "night.json holds arguments by their names; those of the command line win:\n"
        '  {"model_id": "./my-cogvideox", "size": "768x1360", "num_inference_steps": 50}',
    )
    utils.add_prompt(parser, required=False)
    parser.add_argument(
        "--prompts_file",
        type=Path,
        help="a job file of batch.py: JSON lines if it ends in .jsonl, else a prompt a line",
    )
    parser.add_argument(
        "--config", type=Path, help="JSON file of arguments; those of the command line win"
    )
    utils.add_text(parser)
    add_condition(parser)
    utils.add_denoising(parser)
    parser.add_argument(
        "--seeds", type=_seeds, help="a video for each: a range such as 1-4, or 3,7; not --seed"
    )
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
    return parser


def _seeds(text: str) -> str | list[int]:
    try:
        seeds = text if "-" in text else [int(seed) for seed in text.split(",")]
        read_seeds(seeds)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a range as 1-4 nor 3,7") from None
    return seeds


_EXCLUSIVE = (("prompt", "prompts_file"), ("seed", "seeds"))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    words = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    arguments = parser.parse_args(words)
    given = {word.partition("=")[0][2:].replace("-", "_") for word in words if word[:2] == "--"}
    try:
        _check_exclusive(given)
    except ValueError as error:
        parser.error(str(error))
    if arguments.config:
        arguments = parser.parse_args(words, _read_config(arguments.config, given))
    if not arguments.prompt and not arguments.prompts_file:
        parser.error("there is no --prompt, and no --prompts_file")
    return arguments


def _check_exclusive(given: set[str]) -> None:
    """Raises ValueError if two arguments of these names exclude each other."""
    for first, second in _EXCLUSIVE:
        if {first, second} <= given:
            raise ValueError(f"--{first} and --{second} are both given")


def _read_config(path: Path, given: set[str]) -> argparse.Namespace:
    """Reads arguments from a file, without those that others on the command line replace.

    Raises:
        InputError: naming the file and the argument that is wrong.
    """
    parser = make_parser(utils.RaisingParser)
    defaults = vars(parser.parse_args([]))
    settings = read_settings(path, defaults.keys() - {"config"})
    for exclusive in _EXCLUSIVE:
        if not given.isdisjoint(exclusive):
            settings = {key: value for key, value in settings.items() if key not in exclusive}
    if "lora" in given:  # it is repeatable, and would add to those of the file
        settings.pop("lora", None)
    if isinstance(settings.get("seeds"), list):
        settings["seeds"] = ",".join(map(str, settings["seeds"]))
    try:
        _check_exclusive(set(settings))
        for key, value in settings.items():
            if isinstance(value, bool) and not isinstance(defaults[key], bool):
                raise ValueError(f"{key} is {str(value).lower()}; it is no switch")
        return parser.parse_args(utils.to_arguments(settings))
    except ValueError as error:
        raise InputError(f"--config {path}: {error}") from error


def run(arguments: argparse.Namespace) -> None:
    if arguments.seeds or arguments.prompts_file:
        _run_many(arguments)
        return
    utils.choose_platform(arguments)
    utils.join_processes(arguments)
    utils.copy_trusted_executables(arguments)
    folder = arguments.output_dir
    generate.run(
        utils.options(
            encode.EncodeOptions, arguments, condition=condition.options_of(vars(arguments))
        ),
        utils.options(denoise.DenoiseOptions, arguments, input_dir=folder),
        utils.options(decode.DecodeOptions, arguments, input_dir=folder),
    )


def _run_many(arguments: argparse.Namespace) -> None:
    """Runs a batch of the prompts and seeds."""
    for name in ("output_video", "profile", "distributed"):
        if getattr(arguments, name):
            raise InputError(f"--{name} is for one video; leave out --seeds and --prompts_file")

    from jobs import batch
    from jobs.options import BatchOptions

    utils.choose_platform(arguments)
    utils.copy_trusted_executables(arguments)
    options = utils.options(
        BatchOptions,
        arguments,
        jobs=arguments.prompts_file,
        prompts=arguments.prompt or (),
        stages=STAGES,
        retry_failed=True,
    )
    counts = batch.run(options, utils.line_parser(LineSettings, arguments))
    if counts and counts.failed:
        sys.exit(FAILED_JOBS)


if __name__ == "__main__":
    run_script(lambda: run(parse_arguments()))
