"""Makes jobs from the lines of a job file: every setting filled in, checked, and hashed.

The id of a job is a hash of everything that decides its output, so equal ids mean equal jobs. The
mesh and the attention kernel change rounding only and are not part of it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from cogvideox.model.folder import MODEL_PARTS, ModelFolder
from cogvideox.model.settings import DenoisingSettings, complete_settings, text_tokens
from jobs.jobfile import Line
from jobs.records import Job, JobInput
from runtime.fingerprint import fingerprint
from stages import files, speed
from stages.condition import ConditionOptions, find_source
from stages.lora import LoraLibrary, parse_choice
from stages.sections import without_places

_ID_LENGTH = 16
_LABEL_LENGTH = 40  # characters of a name that is made of a prompt


def make_jobs(lines: Sequence[Line], model: ModelFolder) -> tuple[list[Job], list[tuple[int, str]]]:
    """Makes the jobs of a file's lines.

    Returns:
        The jobs, and the problems, each with its line number.
    """
    digest, library = model_digest(model), LoraLibrary(model)
    jobs, problems = [], []
    lines_by_name: dict[str, int] = {}
    lines_by_id: dict[str, int] = {}
    for line in lines:
        try:
            job = make_job(line, model, digest, library)
        except ValueError as error:
            problems.append((line.number, str(error)))
            continue
        # Some file systems ignore case.
        name = line.name and line.name.lower()
        if name in lines_by_name:
            problems.append(
                (line.number, f"name {name!r} is also that of line {lines_by_name[name]}")
            )
        elif job.id in lines_by_id:
            other = lines_by_id[job.id]
            same = f"the same video as that of line {other}; change the seed, for example"
            problems.append((line.number, same))
        if name:
            lines_by_name[name] = line.number
        lines_by_id[job.id] = line.number
        jobs.append(job)
    return jobs, problems


def model_digest(model: ModelFolder) -> str:
    """Hashes what the model's parts contain; see `ModelFolder.digest`."""
    return fingerprint({part: model.digest(part) for part in MODEL_PARTS})


def make_job(line: Line, model: ModelFolder, digest: str, library: LoraLibrary) -> Job:
    """Makes the job of one line.

    Args:
        digest: `model_digest` of the model.
        library: reads LoRA files for the model.

    Raises:
        ValueError: the model cannot compute the settings, or a LoRA cannot be added to it.
    """
    own = line.settings
    names = (field.name for field in dataclasses.fields(DenoisingSettings))
    wishes = {name: getattr(own, name) for name in names}
    given = None
    if own.image or own.video:
        names = {field.name for field in dataclasses.fields(ConditionOptions)}
        names -= {"sha256", "executables"}  # not of a line
        given = ConditionOptions(**{name: getattr(own, name) for name in names})
    elif own.size or own.encode_on:
        raise ValueError("size auto and encode_on are for an image or a video")
    source = find_source(given, model)
    start = None if source is None else source.condition
    if start is not None:
        wishes |= {"height": start.height, "width": start.width}
    any_size = own.allow_unsupported
    settings = complete_settings(wishes, model, any_size=any_size, condition=start)
    decides = {
        "prompt": own.prompt,
        "negative_prompt": own.negative_prompt,
        "max_sequence_length": text_tokens(
            own.max_sequence_length, model.transformer, any_length=own.allow_unsupported
        ),
        "settings": settings,
        "model_id": model.model_id,
        "revision": model.revision,
        "dtype": own.dtype,
        "decoder": own.decoder,
        "quality": own.quality,
        "no_metadata": own.no_metadata,
        "speed": speed.resolve(own, settings, model).to_json(),
        "lora": library.resolve([parse_choice(text) for text in own.lora or ()]).to_json(),
    }
    name = line.name or _label(own.prompt)
    # The content of the model counts, its path does not.
    hashed = {k: v for k, v in decides.items() if k not in ("model_id", "revision")} | {
        "settings": settings.to_json(),
        "model": digest,
        "format": files.FORMAT_VERSION,
        "lora": without_places(decides["lora"]),
    }
    # Exact jobs, and those without LoRAs, keep the ids that they had before there were others.
    if decides["speed"] == speed.EXACT:
        del hashed["speed"]
    if not decides["lora"]:
        del hashed["lora"]
    if source is not None:
        hashed["condition"] = [source.options.kind, source.sha256, source.options.image_fit]
    return Job(
        id=fingerprint(hashed, compact=True)[:_ID_LENGTH], name=name, line=line.number, **decides,
        input=None if source is None else JobInput.of(source),
    )  # fmt: skip


def _label(prompt: str) -> str:
    """Makes a name of the first words of a prompt."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:_LABEL_LENGTH].strip("-")
    return words or "video"
