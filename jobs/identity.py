"""What a job is: every setting filled in, checked, and hashed.

Two jobs are the same if, and only if, their ids are: the id is a hash of everything that decides
the output. The mesh and the attention kernel change rounding alone and are no part of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cogvideox.model.folder import ModelFolder
from cogvideox.model.settings import DenoisingSettings, complete_settings, text_tokens
from jobs.jobfile import Line
from jobs.records import Job
from runtime.fingerprint import fingerprint
from stages import files as stage_files

_ID_LENGTH = 16
_SAMPLE_BYTES = 4096
_SAMPLE_STRIDE = 16 << 20
_LABEL_LENGTH = 40  # of a name made of a prompt


def make_jobs(lines: Sequence[Line], model: ModelFolder) -> tuple[list[Job], list[tuple[int, str]]]:
    """The jobs of a file's lines, and what is wrong, by line number."""
    digest = model_digest(model)
    jobs, problems = [], []
    lines_by_name: dict[str, int] = {}
    lines_by_id: dict[str, int] = {}
    for line in lines:
        try:
            job = _make_job(line, model, digest)
        except ValueError as error:
            problems.append((line.number, str(error)))
            continue
        # Folders on some disks do not tell Kite from kite.
        name = line.name and line.name.lower()
        if name in lines_by_name:
            problems.append((line.number, f"name {name!r} is that of line {lines_by_name[name]}"))
        elif job.id in lines_by_id:
            same = f"the same video as that of line {lines_by_id[job.id]}; change the seed, say"
            problems.append((line.number, same))
        if name:
            lines_by_name[name] = line.number
        lines_by_id[job.id] = line.number
        jobs.append(job)
    return jobs, problems


def model_digest(model: ModelFolder) -> str:
    """A hash of the model's files: configurations whole, weights by size, header and samples.

    Reading 20 GB of weights would take a minute a start; a page of every 16 MiB tells a model
    that was trained on from the one before.
    """
    digest = hashlib.sha256()
    parts = ("tokenizer", "text_encoder", "transformer", "scheduler", "vae")
    files = [path for part in parts for path in (model.path / part).rglob("*") if path.is_file()]
    for path in sorted([model.path / "model_index.json", *files]):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(model.path).as_posix()} {size}\n".encode())
        with open(path, "rb") as file:
            if size <= _SAMPLE_STRIDE:
                digest.update(file.read())
                continue
            header = int.from_bytes(file.read(8), "little")  # how safetensors files begin
            digest.update(file.read(min(header, _SAMPLE_STRIDE)))
            for offset in range(0, size, _SAMPLE_STRIDE):
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def job_arguments(job: Job, batch: Any, output_dir: Path) -> Any:
    """The stages' arguments for one job.

    Args:
        batch: the arguments that all jobs share (mesh, attention, ...).
        output_dir: the batch's; the job's stages read and write in its folder there.
    """
    folder = output_dir / job.folder
    own = dataclasses.asdict(job.settings) | {
        "prompt": [job.prompt],
        "negative_prompt": job.negative_prompt,
        "max_sequence_length": job.max_sequence_length,
        "quality": job.quality,
        "no_metadata": job.no_metadata,
        "allow_unsupported": True,  # the job was checked when it was made
        "input_dir": folder,
        "output_dir": folder,
        "output_video": None,
    }
    return type(batch)(**vars(batch) | own)


def _make_job(line: Line, model: ModelFolder, digest: str) -> Job:
    arguments = line.arguments
    fields = dataclasses.fields(DenoisingSettings)
    wishes = {field.name: getattr(arguments, field.name) for field in fields}
    decides = {
        "prompt": arguments.prompt[0],
        "negative_prompt": arguments.negative_prompt,
        "max_sequence_length": text_tokens(arguments.max_sequence_length, model.transformer),
        "settings": complete_settings(wishes, model, any_size=arguments.allow_unsupported),
        "model_id": model.model_id,
        "revision": model.revision,
        "dtype": arguments.dtype,
        "decoder": arguments.decoder,
        "quality": arguments.quality,
        "no_metadata": arguments.no_metadata,
    }
    name = line.name or _label(arguments.prompt[0])
    hashed = decides | {
        "settings": dataclasses.asdict(decides["settings"]),
        "model": digest,
        "format": stage_files.FORMAT_VERSION,
    }
    return Job(
        id=fingerprint(hashed, compact=True)[:_ID_LENGTH], name=name, line=line.number, **decides
    )


def _label(prompt: str) -> str:
    """The first words of a prompt as a name."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:_LABEL_LENGTH].strip("-")
    return words or "video"
