"""The arguments that scripts share, and what follows from them.

Importing it takes milliseconds, so a script refuses bad arguments before it loads torch, JAX or
diffusers.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from command_line.condition import add_condition
from command_line.parser import ArgumentParser, RaisingParser, integer, number
from command_line.precision import add_precision
from runtime import processes
from runtime.devices import PLATFORMS, insist_on
from runtime.errors import InputError, checking_input
from runtime.trusted_folders import parse_digest
from runtime.versions import versions

DEFAULT_MODEL = "zai-org/CogVideoX1.5-5B"
DEFAULT_FOLDER = Path("stage_outputs")
EXECUTABLES_VARIABLE = "COGVIDEOX_EXECUTABLES"


def add_output_dir(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--output_dir", type=Path, default=DEFAULT_FOLDER, help="folder for the stage files"
    )


def add_model(parser: ArgumentParser, default: str | None) -> None:
    what = "hub id, or a folder in diffusers layout"
    parser.add_argument(
        "--model_id",
        default=default,
        help=what if default else f"{what} (default: the model of the previous stage)",
    )


def add_mesh(parser: ArgumentParser, axes: tuple[str, ...] = ("dp", "sp", "tp")) -> None:
    splits = {"dp": "the batch", "sp": "the tokens", "tp": "heads and MLP columns"}
    for axis in axes:
        what = f"devices along {axis}, which split {splits[axis]} (default: as many as fit)"
        parser.add_argument(f"--{axis}", type=integer(1), help=what)


def add_prompt(parser: ArgumentParser, required: bool = True) -> None:
    parser.add_argument(
        "--prompt",
        action="append",
        required=required,
        help="what the video shows; repeat it for a batch of videos",
    )


def add_text(parser: ArgumentParser) -> None:
    """Adds the arguments that only stage 1 has, except for the prompt."""
    parser.add_argument(
        "--negative_prompt", default="", help="what classifier-free guidance leads away from"
    )
    parser.add_argument(
        "--max_sequence_length",
        type=integer(1, 4096),
        help="tokens per prompt (default: the model's, 226 for the published ones)",
    )


def add_sampling(parser: ArgumentParser) -> None:
    """Adds the settings of stage 2 that decide what a step computes."""
    parser.add_argument(
        "--num_inference_steps",
        "--steps",
        type=integer(1),
        help="denoising steps (default: the model's, 50 for the published ones)",
    )
    parser.add_argument(
        "--guidance_scale",
        "--guidance",
        type=number(0, 1000),
        help="classifier-free guidance; 1 or less turns it off (default: the model's, 6)",
    )
    parser.add_argument(
        "--use_dynamic_cfg", action="store_true", help="vary the guidance scale with the timestep"
    )
    parser.add_argument(
        "--scheduler", choices=("dpm", "ddim"), help="default: the one in the model's folder"
    )
    parser.add_argument("--height", type=int, help="pixels (default: the model's)")
    parser.add_argument("--width", type=int, help="pixels (default: the model's)")
    parser.add_argument("--num_frames", "--frames", type=int, help="default: the model's")
    parser.add_argument("--seed", type=integer(0, 2**64 - 1), default=42, help="of the noise")


def add_denoising(parser: ArgumentParser) -> None:
    """Adds the arguments that only stage 2 has, except for the profile."""
    add_sampling(parser)
    parser.add_argument(
        "--fps", type=integer(1, 240), help="frames per second (default: the model's)"
    )
    add_allow_unsupported(parser)
    parser.add_argument(
        "--strength",
        type=number(0, 1),
        help="of a run that starts from a video: the share of the steps that run; 1 keeps nothing "
        "of it (default: 0.8)",
    )
    add_attention(parser)
    add_speed(parser)
    add_previews(parser)
    parser.add_argument(
        "--lora",
        action="append",
        metavar="FILE[=WEIGHT]",
        help="a LoRA to add to the transformer's weights: a .safetensors file, or HUB_ID[:FILE], "
        "and its weight (1); repeatable",
    )
    parser.add_argument(
        "--checkpoint_every",
        type=integer(1),
        help="save the state of the loop after every so many steps; the same command resumes from "
        "it (default: never)",
    )


def add_speed(parser: ArgumentParser) -> None:
    """Adds the lossy options of stage 2: what they change is more than rounding."""
    parser.add_argument(
        "--speed",
        choices=("exact", "near", "fast", "turbo"),
        default="exact",
        help="all but exact are lossy: near computes 58%% of the steps, fast 48%%, turbo 40%% and "
        "reuses the difference of guidance from half of them on; fast and turbo attend sparsely. "
        "Sets the options below",
    )
    parser.add_argument(
        "--step_mask",
        metavar="{none,near,fast,FILE}",
        help="lossy: skip the transformer in some steps. FILE is a calibration from calibrate.py, "
        'or JSON such as {"steps": "1101"} with 0 for a skipped step (default: that of --speed)',
    )
    parser.add_argument(
        "--mask_steps",
        type=integer(1),
        help="lossy: how many steps the mask computes (default: the share of --step_mask or "
        "--speed)",
    )
    parser.add_argument(
        "--guidance_until",
        type=number(0, 1),
        help="lossy: from this share of the steps on, skip the negative prompt and reuse the "
        "difference that it made (default: that of --speed)",
    )
    parser.add_argument(
        "--sparse_attention",
        metavar="{none,near,fast,FILE}",
        help="lossy: attend to near frames and rows only. FILE has rules for each head, from "
        "calibrate.py --block_rules or your own (default: that of --speed)",
    )
    parser.add_argument(
        "--dense_steps",
        type=integer(0),
        help="steps before attention turns sparse (default: a fifth of them, with --speed turbo a "
        "tenth)",
    )
    parser.add_argument(
        "--dense_layers",
        type=integer(0),
        help="first layers that never attend sparsely (default: 1)",
    )
    add_precision(parser)


def add_previews(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--preview_every",
        type=integer(1),
        help="draw the video so far after every so many steps: stage2_preview.webp, small and "
        "rough (default: never)",
    )
    parser.add_argument(
        "--preview_factors",
        type=Path,
        help="how latents become colours, from calibrate.py --preview (default: the model's own, "
        "or those of the published models)",
    )


def add_allow_unsupported(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--allow_unsupported",
        action="store_true",
        help="allow sizes, frame counts and text lengths that the model was not trained for",
    )


def add_attention(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--attention",
        choices=("auto", "splash", "cudnn", "reference"),
        default="auto",
        help="kernel; auto takes splash on TPU and Hopper GPU, cudnn on other GPU, else reference",
    )


def add_profile(parser: ArgumentParser) -> None:
    parser.add_argument("--profile", type=Path, help="write a JAX profile of the loop here")


def add_output_video(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--output_video",
        type=Path,
        help=".mp4, .gif, .webp, .npy (float32, exact), or a folder of PNG frames "
        "(default: output_video.mp4 in the folder of the latents)",
    )


def add_video(parser: ArgumentParser) -> None:
    """Adds the arguments that only stage 3 has, except for the output."""
    parser.add_argument(
        "--quality", type=integer(0, 10), help="of .mp4 and .webp, 10 is best (default: 7)"
    )
    parser.add_argument(
        "--no_metadata", action="store_true", help="leave the settings out of the mp4"
    )


def add_decoder(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--decoder", choices=("torchax", "flax"), default="torchax", help="VAE of stage 3"
    )


def add_distributed(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="make one video on the devices of several hosts: start the same command on each. "
        "Outside of TPU slices, set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID",
    )


def join_processes(arguments: argparse.Namespace) -> None:
    """With --distributed, joins the processes that run this command. Only the first one prints.

    Raises:
        InputError: they do not find each other, or their arguments or library versions differ.
    """
    if not arguments.distributed or processes.count() > 1:
        return
    with checking_input():
        processes.join()
        if not processes.is_first():
            sys.stdout = open(os.devnull, "w")
        processes.check_alike({**vars(arguments), "versions": versions()})


def add_platform(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--platform",
        choices=PLATFORMS,
        help="run on devices of this kind or not at all (default: TPUs, else GPUs, else the CPU)",
    )


def choose_platform(arguments: argparse.Namespace) -> None:
    """With --platform, makes JAX use this kind of device.

    Raises:
        InputError: this machine has none.
    """
    if arguments.platform:
        insist_on(arguments.platform)


def add_dtype(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="dtype of weights and activations; float32 is for comparisons",
    )


def add_executables(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--executables",
        type=Path,
        default=os.environ.get(EXECUTABLES_VARIABLE) or None,
        help="folder of executables from compile_ahead.py; missing ones are compiled "
        f"(default: ${EXECUTABLES_VARIABLE}, or else what earlier runs kept in the cache)",
    )
    parser.add_argument(
        "--trust_executables",
        metavar="SHA256",
        type=_digest,
        help="digest of the executables, as compile_ahead.py prints it: take them from a folder "
        "that others can write, if nobody has changed them",
    )


def _digest(text: str) -> str:
    try:
        return parse_digest(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def copy_trusted_executables(arguments: argparse.Namespace) -> None:
    """With --trust_executables, makes --executables a copy that nobody else can change.

    Raises:
        InputError: there is no folder, or its digest is another.
        RunError: the copy cannot be written.
    """
    if not arguments.trust_executables:
        return
    if not arguments.executables:
        raise InputError("--trust_executables is for --executables")
    from runtime.compilation import cache_folder
    from runtime.sharing import trusted_copy

    arguments.executables = trusted_copy(
        arguments.executables, arguments.trust_executables, cache_folder()
    )


def options[Options](
    kind: type[Options], arguments: argparse.Namespace, **changes: object
) -> Options:
    """Makes a dataclass whose fields are the arguments of the same names.

    Args:
        kind: a dataclass; arguments that are no field of it are ignored.
        changes: fields whose value is not the argument's.
    """
    assert dataclasses.is_dataclass(kind)
    names = {field.name for field in dataclasses.fields(kind)}
    values = {name: value for name, value in vars(arguments).items() if name in names}
    return kind(**{**values, **changes})


def to_arguments(settings: Mapping[str, object]) -> list[str]:
    """The command line that means the same as settings from a JSON file; lists are repeated."""
    words = []
    for name, value in settings.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not False:
            words += [f"--{name}={one}" for one in (value if isinstance(value, list) else [value])]
    return words


def line_parser[Settings](
    kind: type[Settings], defaults: argparse.Namespace
) -> Callable[[Mapping[str, object]], Settings]:
    """Makes the function that checks the settings of one video as the command line's are checked.

    Args:
        kind: the dataclass to make.
        defaults: what settings are that a video leaves out.
    """
    parser = RaisingParser("", "")
    for add in (add_prompt, add_text, add_condition, add_denoising, add_video):
        add(parser)

    def parse(settings: Mapping[str, object]) -> Settings:
        switched_off = {key: False for key, value in settings.items() if value is False}
        # Repeatable arguments would add to the defaults.
        replaced = {"prompt": None} | {key: None for key in settings if key == "lora"}
        start = argparse.Namespace(**vars(defaults) | replaced | switched_off)
        parsed = parser.parse_args(to_arguments(settings), start)
        return options(kind, parsed, prompt=parsed.prompt[0])

    return parse
