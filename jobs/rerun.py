"""Reproduces a video from its mp4 tag, or from the settings beside it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cogvideox.model.folder import find_model
from cogvideox.model.settings import DenoisingSettings
from cogvideox.video.reading import read_comment
from jobs.jobfile import TYPES, check_type
from runtime.errors import checking_input
from runtime.versions import versions
from stages import files, generate
from stages.decode import DecodeOptions
from stages.denoise import DenoiseOptions
from stages.encode import EncodeOptions
from stages.sections import is_whole


@dataclasses.dataclass(frozen=True)
class RerunOptions:
    """Options of `batch.py rerun`, by the names of the command line.

    Attributes:
        output_dir: None writes to VIDEO_rerun beside the video.
        model_id: None takes the model that made the video.
    """

    video: Path
    output_dir: Path | None = None
    model_id: str | None = None
    dp: int | None = None
    sp: int | None = None
    tp: int | None = None
    executables: Path | None = None


@dataclasses.dataclass(frozen=True)
class Provenance:
    """How a video was made.

    Attributes:
        source: the file that says so.
        sections: of the stages, as in generation_config.json.
    """

    source: Path
    sections: Mapping[str, dict[str, Any]]

    def __getitem__(self, stage: str) -> dict[str, Any]:
        return self.sections[stage]

    @property
    def prompts(self) -> list[str]:
        """Of all videos of the batch, whose noise was drawn together."""
        return files.prompts(self.sections)

    @property
    def decoder(self) -> str:
        return self[files.DECODE]["made_with"]["decoder"].removeprefix("vae_")


def run(options: RerunOptions) -> None:
    """Reads how the video was made, and runs the three stages with the same settings.

    Raises:
        InputError: nothing says how the video was made, or the output folder is not empty.
    """
    with checking_input():
        provenance = read_provenance(options.video)
        output_dir = options.output_dir
        if output_dir is None:
            output_dir = options.video.with_name(f"{options.video.stem}_rerun")
        if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
            raise ValueError(f"{output_dir} exists and is not empty; name another --output_dir")
        encoding, denoising, decoding = stage_options(provenance, options, output_dir)
        model = find_model(encoding.model_id, files.MODEL_PARTS)
    print(f"settings of {provenance.source}")
    for name, was, now in _differences(provenance, model.revision):
        print(f"warning: made with {name} {was}, this is {now}; the result may differ")
    generate.run(encoding, denoising, decoding)


def read_provenance(video: Path) -> Provenance:
    """Reads how a video was made.

    Raises:
        ValueError: the video does not exist, or nothing says how it was made.
    """
    if not video.exists():
        raise ValueError(f"{video} does not exist")
    source = video
    comment = read_comment(video) if video.suffix.lower() == ".mp4" else None
    if comment is None:
        source = video.parent / files.CONFIG_FILE
        config = files.read_config(video.parent)
    else:
        try:
            config = json.loads(comment)
        except ValueError as error:
            raise ValueError(f"the tag of {video} is not this project's: {error}") from error
    for stage in files.STAGES:
        section = config.get(stage) if isinstance(config, dict) else None
        if not isinstance(section, dict) or not is_whole(section):
            raise ValueError(f"{source} does not say what {stage}.py did for {video}")
        for name, value in section.items():
            if name in TYPES and value is not None and name != "prompt":
                check_type(name, value, TYPES[name])
    names = [Path(path).name for path in config[files.DECODE]["output_video"]]
    if comment is None and video.name not in names:
        raise ValueError(f"{source} is about {', '.join(names)}, not about {video.name}")
    return Provenance(source, config)


def stage_options(
    provenance: Provenance, options: RerunOptions, output_dir: Path
) -> tuple[EncodeOptions, DenoiseOptions, DecodeOptions]:
    """The options of each stage that reproduce the video in `output_dir`."""
    first, second, third = (provenance[stage] for stage in files.STAGES)
    video = Path(third["output_video"][0])
    if len(provenance.prompts) > 1:  # the stage numbers them again
        video = video.with_stem(re.sub(r"-0$", "", video.stem))
    untagged = video.suffix.lower() == ".mp4" and provenance.source.suffix.lower() != ".mp4"
    encoding = EncodeOptions(
        prompt=provenance.prompts,
        model_id=options.model_id or first["model_id"],
        dtype=first["dtype"],
        output_dir=output_dir,
        negative_prompt=first["negative_prompt"],
        max_sequence_length=first["max_sequence_length"],
    )
    denoising = DenoiseOptions(
        input_dir=output_dir,
        output_dir=output_dir,
        dtype=second["dtype"],
        **{field.name: second[field.name] for field in dataclasses.fields(DenoisingSettings)},
        allow_unsupported=True,  # they were computed once
        dp=options.dp,
        sp=options.sp,
        tp=options.tp,
        executables=options.executables,
    )
    decoding = DecodeOptions(
        input_dir=output_dir,
        dtype=third["dtype"],
        decoder=provenance.decoder,
        output_video=output_dir / video.name,
        fps=third["fps"],
        quality=third["quality"],
        no_metadata=untagged,
        dp=options.dp,
        tp=options.tp,
        executables=options.executables,
    )
    return encoding, denoising, decoding


def _differences(provenance: Provenance, revision: str | None) -> list[tuple[str, str, str]]:
    """Name, version then and version now of the model and each library that has changed."""
    then = {**provenance[files.DENOISE]["made_with"]["versions"]}
    then["the model's revision"] = provenance[files.DENOISE]["revision"]
    now = {**versions(), "the model's revision": revision}
    return [(name, was, now[name]) for name, was in then.items() if was != now[name]]
