"""The files between the stages: their names, their metadata, and checks of both.

Importing it loads neither torch, JAX nor diffusers, so bad input is refused first.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime import processes
from runtime.errors import InputError, RunError
from runtime.files import write_json
from runtime.json_files import read_json_object
from runtime.tensor_files import TensorFile, check_header, read_header, write_tensors
from runtime.text import printable
from runtime.trusted_folders import check_trusted
from stages.sections import (
    ENCODE,
    PARTS,
    STAGES,
    check_section,
    is_whole,
)

if TYPE_CHECKING:
    import numpy as np
    import torch

    from cogvideox.model.folder import ModelFolder

FORMAT_VERSION = "2"
CONFIG_FILE = "generation_config.json"
EMBEDDINGS_FILE = "stage1_embeddings.safetensors"
CONDITIONS_FILE = "stage1_conditions.safetensors"
INPUT_FILE = "stage1_input.png"  # a small picture of the image or video of stage 1
LATENTS_FILE = "stage2_latents.safetensors"
OLD_CHECKPOINT_FILE = "stage2_checkpoint.safetensors"  # of batches, before names had the run
_CHECKPOINT = re.compile(r"stage2_checkpoint-[0-9a-f]{12}\.safetensors", re.ASCII)
VIDEO_FILE = "output_video.mp4"

_MAX_CONFIG_BYTES = 4 << 20
_NEEDED_INODES = 8


def read_config(folder: Path, *needed: str) -> dict[str, Any]:
    """Reads the sections that earlier stages recorded in `folder`.

    Args:
        needed: the stages whose sections must be there and as they were written.

    Returns:
        The format version and those sections that are as they were written.

    Raises:
        InputError: the file is missing, broken, or of another format version, or a section of
            `needed` is missing or was changed. The message names the stage to run.
    """
    path = folder / CONFIG_FILE
    stage = needed[-1] if needed else ENCODE
    if not os.path.lexists(path):
        raise InputError(f"{path} does not exist; run {stage}.py first")
    try:
        config = read_json_object(path, max_bytes=_MAX_CONFIG_BYTES)
    except InputError as error:
        raise InputError(f"{error}; run {needed[0] if needed else ENCODE}.py again") from error
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        shown = printable(str(version)[:80])
        raise InputError(
            f"{path} has format version {shown}, this program {FORMAT_VERSION}; run "
            f"{needed[0] if needed else ENCODE}.py again"
        )
    for stage in needed:
        try:
            check_section(stage, config.get(stage))
        except ValueError as error:
            raise InputError(f"{path}: {printable(str(error))}; run {stage}.py again") from error
    whole: dict[str, Any] = {"format_version": FORMAT_VERSION}
    for stage in STAGES:
        section = config.get(stage)
        if isinstance(section, dict) and is_whole(section):
            whole[stage] = section
    return whole


def record_section(folder: Path, stage: str, section: Mapping[str, Any], inherited: Path) -> None:
    """Writes a stage's section into the config of `folder`; keeps every other valid section.

    Args:
        inherited: the folder whose config holds the sections of earlier stages.

    Raises:
        RunError: the config of `inherited` is gone.
    """
    write_json(folder / CONFIG_FILE, merged_config(folder, stage, section, inherited))


def merged_config(
    folder: Path, stage: str, section: Mapping[str, Any], inherited: Path
) -> dict[str, Any]:
    """Returns what `record_section` writes."""
    config: dict[str, Any] = {"format_version": FORMAT_VERSION}
    if stage != ENCODE and not (inherited / CONFIG_FILE).exists():
        raise RunError(f"{inherited / CONFIG_FILE} was removed while {stage}.py ran")
    for source in dict.fromkeys((folder, inherited)):
        if os.path.lexists(source / CONFIG_FILE):
            try:
                config |= read_config(source)
            except InputError as error:
                print(f"replacing {source / CONFIG_FILE}: {error}")
    return config | {stage: dict(section)}


@dataclasses.dataclass(frozen=True)
class StageFile:
    """A stage's tensors on disk, checked against the config beside them.

    Attributes:
        stage: the stage that wrote the file.
        section: of that stage, from generation_config.json.
    """

    stage: str
    section: dict[str, Any]
    tensors: TensorFile

    @property
    def path(self) -> Path:
        return self.tensors.path

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.tensors.items()}


def write_stage_file(
    path: Path,
    stage: str,
    tensors: Mapping[str, np.ndarray],
    section: Mapping[str, Any],
    **extra: str,
) -> None:
    """Writes numpy `tensors` with the metadata that the next stage checks.

    Args:
        extra: more metadata.
    """
    stamp = {
        "format_version": FORMAT_VERSION,
        "stage": stage,
        "fingerprint": section["fingerprint"],
        **extra,
    }
    if path.exists():
        print(f"replacing {path}")
    write_tensors(path, tensors, stamp)


def open_stage_file(
    folder: Path, name: str, stage: str, config: Mapping[str, Any], tensor_names: set[str]
) -> StageFile:
    """Checks a stage file's header; reads no tensor.

    Raises:
        InputError: the file is missing, truncated, of another stage or format version, or not
            the one that the config beside it describes.
    """
    path = folder / name
    again = f"run {stage}.py again"
    if not os.path.lexists(path):
        raise InputError(f"{path} does not exist; run {stage}.py first")
    try:
        file = read_header(path)
    except InputError as error:
        raise InputError(f"{error}; {again}") from error
    stamp = file.metadata
    if stamp.get("stage") != stage or set(file.tensors) != tensor_names:
        raise InputError(f"{path} was not written by {stage}.py; {again}")
    if stamp.get("format_version") != FORMAT_VERSION:
        shown = printable(str(stamp.get("format_version"))[:80])
        raise InputError(
            f"{path} has format version {shown}, this program {FORMAT_VERSION}; {again}"
        )
    try:
        check_header(file)
    except InputError as error:
        raise InputError(f"{error}; {again}") from error
    section = config[stage]
    if stamp.get("fingerprint") != section["fingerprint"]:
        raise InputError(f"{path} is stale: {CONFIG_FILE} beside it describes another run; {again}")
    return StageFile(stage, section, file)


def read_tensors(file: StageFile) -> dict[str, np.ndarray]:
    """Reads the tensors of a checked stage file.

    Raises:
        InputError: their bytes are not those that the stage wrote.
    """
    try:
        return file.tensors.read()
    except InputError as error:
        raise InputError(f"{error}; run {file.stage}.py again") from error


def find_same_model(model_id: str | None, made_from: StageFile, stage: str) -> ModelFolder:
    """Finds the model that continues a stage file, also if it was moved.

    Args:
        model_id: what the user named; None takes the recorded place.
        stage: the stage that will load its parts of the model.

    Raises:
        ValueError: the model does not exist, or a part that `stage` loads has another content
            than the model that made the file.
    """
    from cogvideox.model.folder import find_model

    section = made_from.section
    recorded = section["model_id"]
    try:
        model = find_model(model_id or recorded, PARTS[stage])
    except ValueError as error:
        if model_id:
            raise
        raise ValueError(
            f"{error}; {made_from.path} was made with it; name its place now with --model_id"
        ) from error
    known = section["made_with"].get("later_parts")
    for part in PARTS[stage]:
        was = known.get(part) if isinstance(known, dict) else None
        if was and model.digest(part) != was:
            raise ValueError(
                f"{made_from.path} was made with another {part} than that of {model.path}: its "
                f"digest was {was}, now it is {model.digest(part)}; take the model that made it, "
                f"or run {made_from.stage}.py again with this one"
            )
    return model


def check_inputs_are_current(
    file: StageFile, config: Mapping[str, Any], key: str, stage: str
) -> None:
    """Checks that `stage` has not run again since it made the input of `file`.

    Args:
        key: names the input's fingerprint in the section of `file`.

    Raises:
        InputError: the file is stale.
    """
    if file.section[key] != config.get(stage, {}).get("fingerprint"):
        raise InputError(
            f"{file.path} is stale: {stage}.py ran again since; run {file.stage}.py again"
        )


def numbered(path: Path, count: int) -> list[Path]:
    """Returns `path`, or one path per video of a batch: video-0.mp4, video-1.mp4, ..."""
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(count)]


def contact_sheet(video: Path) -> Path:
    """Returns the path of a video's contact sheet."""
    return video.with_name(f"{_prefix(video)}_contact_sheet.png")


def timings_file(video: Path) -> Path:
    """Returns the path of the timings of the run that made a video."""
    return video.with_name(f"{_prefix(video)}_timings.json")


def _prefix(video: Path) -> str:
    """Returns a prefix that no other kind of video of the same stem shares."""
    if video.suffix.lower() == ".mp4":
        return video.stem
    return video.name if video.suffix else f"{video.name}.frames"


def checkpoint_file(section: Mapping[str, Any]) -> str:
    """The name of a run's checkpoint: runs with other settings in the same folder have others."""
    return f"stage2_checkpoint-{section['fingerprint'][:12]}.safetensors"


def is_checkpoint(name: str) -> bool:
    """Whether a file is a checkpoint of a run, by its name."""
    return name == OLD_CHECKPOINT_FILE or bool(_CHECKPOINT.fullmatch(name))


def check_executables(folder: Path | None) -> None:
    """Checks the folder of --executables.

    Raises:
        ValueError: it is not a folder, or others can write it.
    """
    if folder and not os.path.isdir(folder):
        raise ValueError(f"--executables {folder} is not a folder; compile_ahead.py makes it")
    if folder:
        check_trusted(folder, "--executables")


def check_output_folder(folder: Path, *names: str, needed_bytes: int = 1 << 30) -> None:
    """Checks that a folder can be made and written, and has enough space.

    Args:
        names: the files that will be written there.

    Raises:
        ValueError: naming the folder and the reason.
    """
    if not processes.is_first():
        return  # other processes write nothing
    # os.path.exists, unlike Path.exists, is false for names that no file system takes.
    existing = next(p for p in (folder, *folder.absolute().parents) if os.path.exists(p))
    if any(len(part.encode()) > 255 for part in folder.absolute().parts):
        raise ValueError(f"{folder} has a part of more than 255 bytes")
    if not existing.is_dir():
        raise ValueError(f"{folder} cannot be a folder: {existing} is a file")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"{folder} is not writable")
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise ValueError(f"{folder} has {free >> 20} MiB free; {needed_bytes >> 20} are needed")
    inodes = os.statvfs(existing)
    if inodes.f_files and inodes.f_favail < _NEEDED_INODES:  # some file systems count none
        raise ValueError(f"{folder} has no inodes left for new files")
    for name in names:
        excess = len(os.fsencode(name)) - 255
        if excess > 0:
            raise ValueError(f"the name {name[:40]}... is too long by {excess} bytes")
        if (folder / name).is_dir():
            raise ValueError(f"{folder / name} is a folder; it should be a file")


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Converts a torch tensor on the CPU to numpy, bfloat16 to that of ml_dtypes."""
    import ml_dtypes
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def check_finite(tensors: Mapping[str, Any], stage: str) -> None:
    """Checks a stage's output before it is written.

    Raises:
        RunError: it holds NaN or infinity.
    """
    import numpy as np

    for name, tensor in tensors.items():
        bad = int((~np.isfinite(tensor.astype(np.float32))).sum())
        if bad:
            raise RunError(
                f"{stage}: {bad} of {tensor.size} values of {name} are NaN or infinite; "
                "nothing was written"
            )


def prompts(config: Mapping[str, Any]) -> list[str]:
    """The prompts of a batch, from the sections of generation_config.json."""
    prompt = config[ENCODE]["prompt"]
    return [prompt] if isinstance(prompt, str) else prompt
