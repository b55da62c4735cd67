"""The files between the stages: their names, their metadata, and checks of both.

Importing it loads neither torch, JAX nor diffusers, so bad input is refused first.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors

from runtime import processes
from runtime.errors import InputError, RunError
from runtime.files import atomic_path, write_json
from runtime.fingerprint import fingerprint as hash_json
from runtime.json_files import read_json_object
from runtime.versions import versions

if TYPE_CHECKING:
    import numpy as np
    import torch

FORMAT_VERSION = "1"
CONFIG_FILE = "generation_config.json"
EMBEDDINGS_FILE = "stage1_embeddings.safetensors"
LATENTS_FILE = "stage2_latents.safetensors"
CHECKPOINT_FILE = "stage2_checkpoint.safetensors"
VIDEO_FILE = "output_video.mp4"

# The stages in their order: the names of the scripts, of the sections in generation_config.json,
# and in the stage files' metadata.
ENCODE = "stage1_text_encoder"
DENOISE = "stage2_transformer"
DECODE = "stage3_vae_decoder"
STAGES = (ENCODE, DENOISE, DECODE)

# The sub-folders of a model that the three stages load.
MODEL_PARTS = ("tokenizer", "text_encoder", "transformer", "scheduler", "vae")


_FINGERPRINT_LENGTH = 16
_MAX_CONFIG_BYTES = 4 << 20


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Hashes the settings that decide a stage's output, to 16 hexadecimal digits."""
    return hash_json(settings)[:_FINGERPRINT_LENGTH]


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the sections that earlier stages recorded in `folder`.

    Raises:
        InputError: the file is missing, broken, or of another format version.
    """
    path = folder / CONFIG_FILE
    if not path.exists():
        raise InputError(f"{path} does not exist; run the stages in their order")
    config = read_json_object(path, max_bytes=_MAX_CONFIG_BYTES)
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(f"{path} has format version {version}, this program {FORMAT_VERSION}")
    return config


def record_section(folder: Path, stage: str, section: Mapping[str, Any], inherited: Path) -> None:
    """Writes a stage's section into the config of `folder`; keeps every other section.

    Args:
        inherited: the folder whose config holds the sections of earlier stages.
    """
    config: dict[str, Any] = {"format_version": FORMAT_VERSION}
    for source in (folder, inherited):
        if (source / CONFIG_FILE).exists():
            config |= read_config(source)
    write_json(folder / CONFIG_FILE, config | {stage: dict(section)})


def make_section(settings: Mapping[str, Any], **made_with: Any) -> dict[str, Any]:
    """Makes a section of generation_config.json.

    Args:
        settings: everything that decides the output.
        made_with: facts that do not decide it, such as the mesh.

    Returns:
        The settings, their fingerprint, and `made_with` together with the library versions.
    """
    made_with["versions"] = versions()
    return {**settings, "fingerprint": fingerprint(settings), "made_with": made_with}


def is_whole(section: Mapping[str, Any]) -> bool:
    """Whether the fingerprint of a section is that of its settings."""
    settings = {k: v for k, v in section.items() if k not in ("fingerprint", "made_with")}
    return section.get("fingerprint") == fingerprint(settings)


@dataclasses.dataclass(frozen=True)
class StageFile:
    """A stage's tensors on disk, checked against the config beside them.

    Attributes:
        section: of the stage that wrote the file, from generation_config.json.
    """

    path: Path
    section: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]


def write_stage_file(
    path: Path, stage: str, tensors: Mapping[str, Any], section: Mapping[str, Any], **extra: str
) -> None:
    """Writes numpy `tensors` with the metadata that the next stage checks.

    Args:
        extra: more metadata.
    """
    import numpy as np
    from safetensors.numpy import save

    # safetensors ignores strides and writes the memory in its order.
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    stamp = {
        "format_version": FORMAT_VERSION,
        "stage": stage,
        "model_id": section["model_id"],
        "fingerprint": section["fingerprint"],
        "shapes": json.dumps(shapes),
        **extra,
    }
    if path.exists():
        print(f"replacing {path}")
    with atomic_path(path) as temporary:
        temporary.write_bytes(_with_sorted_metadata(save(tensors, metadata=stamp)))


def _with_sorted_metadata(content: bytes) -> bytes:
    """Sorts the metadata of a safetensors file, which safetensors writes in random order.

    Equal runs then write equal files, whose checksums can be compared.
    """
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at multiples of 8 bytes
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


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
    if not path.is_file():
        raise InputError(f"{path} does not exist; run {stage}.py first")
    try:
        with safetensors.safe_open(path, "np") as handle:
            stamp = handle.metadata() or {}
            shapes = {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(
            f"{path} is truncated or not a safetensors file ({error}); {again}"
        ) from error
    if stamp.get("stage") != stage or set(shapes) != tensor_names:
        raise InputError(f"{path} was not written by {stage}.py; {again}")
    if stamp.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {stamp.get('format_version')}, this program "
            f"{FORMAT_VERSION}; {again}"
        )
    section = config.get(stage)
    if not isinstance(section, dict):
        raise InputError(f"{folder / CONFIG_FILE} has no section {stage}; {again}")
    if stamp.get("fingerprint") != section.get("fingerprint") or not is_whole(section):
        raise InputError(f"{path} is stale: {CONFIG_FILE} beside it describes another run; {again}")
    return StageFile(path, section, shapes)


def read_tensors(file: StageFile) -> dict[str, Any]:
    """Reads the tensors of a checked stage file."""
    from safetensors.numpy import load_file

    return load_file(file.path)


def find_same_model(model_id: str | None, made_from: StageFile, parts: list[str]) -> Any:
    """Finds the model that a stage file was made with.

    Args:
        model_id: what the user named; None takes the recorded model.
        parts: the sub-folders that this stage loads.

    Raises:
        ValueError: `model_id` names another model, or the model does not exist.
    """
    from cogvideox.model.folder import find_model

    recorded = made_from.section["model_id"]
    model = find_model(model_id or recorded, parts)
    if model.model_id != recorded:
        raise ValueError(
            f"{made_from.path} was made with {recorded}, not with --model_id {model_id}"
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
            f"{file.path} is stale: {stage}.py ran again since; run the next stage again, too"
        )


def numbered(path: Path, count: int) -> list[Path]:
    """Returns `path`, or one path per video of a batch: video-0.mp4, video-1.mp4, ..."""
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(count)]


def contact_sheet(video: Path) -> Path:
    """Returns the path of a video's contact sheet."""
    return video.with_name(f"{video.stem}_contact_sheet.png")


def check_executables(folder: Path | None) -> None:
    """Checks the folder of --executables.

    Raises:
        ValueError: it is not a folder.
    """
    if folder and not os.path.isdir(folder):
        raise ValueError(f"--executables {folder} is not a folder; compile_ahead.py makes it")


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
    for name in names:
        if (folder / name).is_dir():
            raise ValueError(f"{folder / name} is a folder; it should be a file")
    if (folder / CONFIG_FILE).exists():
        read_config(folder)


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
