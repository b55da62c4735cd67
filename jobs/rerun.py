"""A video made again from what it says of itself: its mp4 tag, or the settings beside it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import generate
import stage1_text_encoder as stage1
import stage2_transformer as stage2
import stage3_vae_decoder as stage3
import utils
from cogvideox.model.folder import find_model
from cogvideox.model.settings import DenoisingSettings
from cogvideox.video.reading import read_comment
from runtime.errors import checking_input
from runtime.versions import versions
from stages import files as stage_files
from utils import ArgumentParser

_STAGES = (stage1.STAGE, stage2.STAGE, stage3.STAGE)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a video was made: the sections of the stages, and the file that says so."""

    source: Path
    sections: Mapping[str, dict[str, Any]]

    def __getitem__(self, stage: str) -> dict[str, Any]:
        return self.sections[stage]

    @property
    def prompts(self) -> list[str]:
        """Of all videos that were made together; their noise was drawn together."""
        prompt = self[stage1.STAGE]["prompt"]
        return [prompt] if isinstance(prompt, str) else prompt

    @property
    def decoder(self) -> str:
        return self[stage3.STAGE]["made_with"]["decoder"].removeprefix("vae_")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        "Makes a video again, with the prompt, seed and settings that its mp4 tag names, or\n"
        f"{stage_files.CONFIG_FILE} in its folder.",
        "  python batch.py rerun night/kite-0123456789ab/output_video.mp4\n"
        "  python batch.py rerun kite.mp4 --model_id ./moved-model --output_dir again",
    )
    parser.prog += " rerun"
    parser.add_argument("video", type=Path, help="any video of this project")
    parser.add_argument(
        "--output_dir", type=Path, help="a new folder (default: VIDEO_rerun beside the video)"
    )
    utils.add_model(parser, default=None)
    utils.add_mesh(parser)
    utils.add_executables(parser)
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """Reads how the video was made, and runs the three stages like that.

    Raises:
        InputError: nothing says how it was made, or the folder to write to has files in it.
    """
    with checking_input():
        recipe = read_recipe(arguments.video)
        output_dir = arguments.output_dir
        if output_dir is None:
            output_dir = arguments.video.with_name(f"{arguments.video.stem}_rerun")
        if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
            raise ValueError(f"{output_dir} exists and is not empty; name another --output_dir")
        parsed = stage_arguments(recipe, arguments, output_dir)
        parts = ["tokenizer", "text_encoder", "transformer", "scheduler", "vae"]
        model = find_model(parsed[0].model_id, parts)
    print(f"settings of {recipe.source}")
    for name, was, now in _differences(recipe, model.revision):
        print(f"warning: made with {name} {was}, this is {now}; the result may differ")
    generate.run_stages(*parsed, recipe.decoder)


def read_recipe(video: Path) -> Recipe:
    """The recipe of a video.

    Raises:
        ValueError: there is no video, or nothing that says how it was made.
    """
    if not video.exists():
        raise ValueError(f"{video} does not exist")
    source = video
    comment = read_comment(video) if video.suffix.lower() == ".mp4" else None
    if comment is None:
        source = video.parent / stage_files.CONFIG_FILE
        config = stage_files.read_config(video.parent)
    else:
        try:
            config = json.loads(comment)
        except ValueError as error:
            raise ValueError(f"the tag of {video} is not this project's: {error}") from error
    for stage in _STAGES:
        section = config.get(stage) if isinstance(config, dict) else None
        if not isinstance(section, dict) or not stage_files.is_whole(section):
            raise ValueError(f"{source} does not say what {stage}.py did for {video}")
    names = [Path(path).name for path in config[stage3.STAGE]["output_video"]]
    if comment is None and video.name not in names:
        raise ValueError(f"{source} is about {', '.join(names)}, not about {video.name}")
    return Recipe(source, config)


def stage_arguments(
    recipe: Recipe, arguments: argparse.Namespace, output_dir: Path
) -> tuple[argparse.Namespace, argparse.Namespace, argparse.Namespace]:
    """What the stages' own parsers make of a recipe; they check its values."""
    first, second, third = (recipe[stage] for stage in _STAGES)
    model = arguments.model_id or first["model_id"]
    text = [f"--prompt={prompt}" for prompt in recipe.prompts]
    text += _options(first, ["negative_prompt", "max_sequence_length", "dtype"])
    names = [field.name for field in dataclasses.fields(DenoisingSettings)]
    latents = _options(second, [*names, "dtype"])
    # They were computed once, so they can be again.
    latents.append("--allow_unsupported")
    video = Path(third["output_video"][0])
    if len(recipe.prompts) > 1:  # the stage numbers them again
        video = video.with_stem(re.sub(r"-0$", "", video.stem))
    frames = [f"--output_video={output_dir / video.name}"]
    frames += _options(third, ["fps", "quality", "dtype"])
    if video.suffix.lower() == ".mp4" and recipe.source.suffix.lower() != ".mp4":
        frames.append("--no_metadata")
    parsed = (
        stage1.parse_arguments([*text, f"--model_id={model}", f"--output_dir={output_dir}"]),
        stage2.parse_arguments(latents),
        stage3.parse_arguments(frames),
    )
    for stage in parsed[1:]:
        for name in ("dp", "sp", "tp", "executables"):
            setattr(stage, name, getattr(arguments, name))
    return parsed


def _options(section: Mapping[str, Any], names: list[str]) -> list[str]:
    """The named settings of a section as arguments."""
    options = []
    for name in names:
        value = section[name]
        if value is True:
            options.append(f"--{name}")
        elif value is not None and value is not False:
            options.append(f"--{name}={value}")
    return options


def _differences(recipe: Recipe, revision: str | None) -> list[tuple[str, str, str]]:
    """Name, version then, version now of each library that has changed, and of the model."""
    then = {**recipe[stage2.STAGE]["made_with"]["versions"]}
    then["the model's revision"] = recipe[stage2.STAGE]["revision"]
    now = {**versions(), "the model's revision": revision}
    return [(name, was, now[name]) for name, was in then.items() if was != now[name]]
