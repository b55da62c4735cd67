"""Reproduces a video from its mp4 tag, or from the settings next to it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cogvideox.model.folder import MODEL_PARTS, find_model
from cogvideox.model.settings import DenoisingSettings
from cogvideox.video.reading import read_comment
from jobs.jobfile import TYPES, check_type
from runtime.errors import checking_input
from runtime.json_files import parse_json_object
from runtime.text import printable
from runtime.versions import versions
from stages import files, generate, lora, speed
from stages.condition import ConditionOptions, recorded
from stages.decode import DecodeOptions
from stages.denoise_options import DenoiseOptions
from stages.encode import EncodeOptions
from stages.sections import DECODE, DENOISE, ENCODE, STAGES, check_section
from stages.video_digest import digest, recorded_digest


@dataclasses.dataclass(frozen=True)
class RerunOptions:
    """Options of `batch.py rerun`, by the names of the command line.

    Attributes:
        output_dir: None writes to VIDEO_rerun next to the video.
        model_id: None takes the model that made the video.
        lora: files, or folders of files, that may be the LoRAs that made the video; the sha256
            decides. None looks only where they were, and beside the video.
        input: the image or video that it started from, if that has moved.
    """

    video: Path
    output_dir: Path | None = None
    model_id: str | None = None
    lora: Sequence[str] | None = None
    dp: int | None = None
    sp: int | None = None
    tp: int | None = None
    executables: Path | None = None
    input: Path | None = None


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
        return self[DECODE]["made_with"]["decoder"].removeprefix("vae_")


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
        model = find_model(encoding.model_id, MODEL_PARTS)
    print(printable(f"settings of {provenance.source}"))
    for name, was, now in _differences(provenance, model.revision):
        line = f"warning: made with {name} {was}, this is {now}; the result may differ"
        print(printable(line))
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
        config = parse_json_object(comment, f"the tag of {video}")
    sections: dict[str, dict[str, Any]] = {}
    for stage in STAGES:
        try:
            section = sections[stage] = check_section(stage, config.get(stage))
        except ValueError as error:
            raise ValueError(
                f"{source} does not say what {stage}.py did for {video}: {error}"
            ) from error
        for name, value in section.items():
            if name in TYPES and value is not None and name not in ("prompt", "speed"):
                check_type(name, value, TYPES[name])
    _check_chain(sections, source)
    if comment is None:
        _check_digest(sections[DECODE], source, video)
    return Provenance(source, sections)


def _check_chain(sections: Mapping[str, dict[str, Any]], source: Path) -> None:
    """Checks that each section is of a run on the output of the one before.

    Raises:
        ValueError: a stage ran again after a later one.
    """
    inputs = ((ENCODE, DENOISE, "embeddings"), (DENOISE, DECODE, "latents"))
    for before, after, key in inputs:
        if sections[after][key] != sections[before]["fingerprint"]:
            raise ValueError(
                f"{source} describes different runs: {before}.py ran again after {after}.py"
            )
    made_with = sections[DECODE]["made_with"]
    if made_with.get("decoder") not in ("vae_torchax", "vae_flax"):
        raise ValueError(f"{source} names no decoder of this project")


def _check_digest(section: dict[str, Any], source: Path, video: Path) -> None:
    """Checks that settings next to a video belong to this file.

    Raises:
        ValueError: they are of another video, or of another run.
    """
    names = [Path(path).name for path in section["output_video"]]
    if video.name not in names:
        raise ValueError(f"{source} is about {', '.join(names)}, not about {video.name}")
    recorded, found = recorded_digest(section, video), digest(video)
    if recorded != found:
        raise ValueError(
            f"{source} describes another {video.name} (sha256 {str(recorded)[:12]}, this file has "
            f"{found[:12]}): a later run replaced the settings, or the video was changed"
        )


def stage_options(
    provenance: Provenance, options: RerunOptions, output_dir: Path
) -> tuple[EncodeOptions, DenoiseOptions, DecodeOptions]:
    """The options of each stage that reproduce the video in `output_dir`."""
    first, second, third = (provenance[stage] for stage in STAGES)
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
        condition=_condition_options(first, options),
        allow_unsupported=True,  # they were computed once
    )
    denoising = DenoiseOptions(
        input_dir=output_dir,
        output_dir=output_dir,
        dtype=second["dtype"],
        **{
            f.name: second[f.name]
            for f in dataclasses.fields(DenoisingSettings)
            if f.name in second
        },
        allow_unsupported=True,  # they were computed once
        lossy=speed.read_lossy(second.get("speed", speed.EXACT)),
        loras=lora.locate(
            lora.read_choices(second.get("lora")),
            [*map(Path, options.lora or ()), options.video.absolute().parent],
        ),
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


def _condition_options(
    section: Mapping[str, Any], options: RerunOptions
) -> ConditionOptions | None:
    """The options of the image or video that stage 1 encoded; None if there was none.

    Raises:
        ValueError: the section does not say which file it was.
    """
    found = recorded(section)
    if found is None:
        return None
    made_with, described = section["made_with"], section["conditions"]
    path, encoder = made_with.get(found.kind), made_with.get("encoder")
    where, fit = made_with.get("encoded_on"), described.get("image_fit")
    known = isinstance(path, str) and encoder in ("torchax", "flax") and fit in ("stretch", "crop")
    if not known or where not in ("cpu", "devices"):
        raise ValueError(f"section {ENCODE} does not say how its {found.kind} was encoded")
    file = options.input or Path(path)
    if not file.exists():
        raise ValueError(
            f"{file} is not there: the {found.kind} that the video started from (sha256 "
            f"{str(described.get('sha256'))[:12]}); name its place with --input"
        )
    return ConditionOptions(
        image=file if found.kind == "image" else None,
        video=file if found.kind == "video" else None,
        image_fit=fit,
        height=found.height,
        width=found.width,
        allow_unsupported=True,  # it was encoded once
        encode_on=where,
        encoder=encoder,
        sha256=str(described.get("sha256")),
        executables=options.executables,
    )


def _differences(provenance: Provenance, revision: str | None) -> list[tuple[str, str, str]]:
    """Name, version then and version now of the model and each library that has changed."""
    section = provenance[DENOISE]
    recorded = section["made_with"].get("versions")
    then = {**recorded} if isinstance(recorded, dict) else {}
    then["the model's revision"] = section["revision"]
    now = {**versions(), "the model's revision": revision}
    return [
        (name, str(was)[:80], str(now.get(name, "not installed")))
        for name, was in then.items()
        if was != now.get(name)
    ]
