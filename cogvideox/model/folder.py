"""A model folder in diffusers layout: where it is, its configuration, its weight files.

Everything that can be refused about a model is refused here, from JSON files and safetensors
headers alone, before any weight is read.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors

from cogvideox.model.config import (
    SchedulerConfig,
    TransformerConfig,
    VaeConfig,
)
from runtime.json_files import read_json_object


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A diffusers-format model on disk, as one stage sees it."""

    model_id: str  # what the user named: a hub id, or the folder's absolute path
    revision: str | None  # the hub commit, None for a folder
    path: Path

    @cached_property
    def transformer(self) -> TransformerConfig:
        """The transformer's configuration; the file is read once."""
        return TransformerConfig.from_file(self.path / "transformer" / "config.json")

    @cached_property
    def vae(self) -> VaeConfig:
        """The VAE's configuration."""
        return VaeConfig.from_file(self.path / "vae" / "config.json")

    @cached_property
    def scheduler(self) -> SchedulerConfig:
        """The scheduler's configuration."""
        return SchedulerConfig.from_file(self.path / "scheduler" / "scheduler_config.json")

    def component_class(self, part: str) -> str:
        """The class that model_index.json names for `part`, such as "T5EncoderModel"."""
        index = read_json_object(self.path / "model_index.json")
        entry = index.get(part)
        if not (isinstance(entry, list) and len(entry) == 2 and entry[1]):
            raise ValueError(f"{self.path / 'model_index.json'} names no class for {part!r}")
        return str(entry[1])


def find_model(model_id: str, parts: Sequence[str]) -> ModelFolder:
    """Finds the model and makes sure that the JSON files of all and the weights of `parts` exist.

    Args:
        model_id: a folder in diffusers layout or a Hugging Face hub id (downloaded to, or read
            from, the hub cache; only `parts` are fetched).
        parts: the sub-folders this stage loads.

    Raises:
        ValueError: there is no such model, or a part of it is missing.
    """
    path = Path(model_id).expanduser()
    if os.path.isdir(path):  # unlike Path.is_dir, false for names that no file system takes
        model = ModelFolder(str(path.resolve()), None, path.resolve())
    else:
        snapshot = Path(_download(model_id, ["*.json", *(f"{part}/*" for part in parts)]))
        model = ModelFolder(model_id, snapshot.name, snapshot)
    for part in parts:
        model.component_class(part)
        if not (model.path / part).is_dir():
            raise ValueError(f"model {model_id} has no folder {part}/")
    return model


def _download(model_id: str, patterns: list[str]) -> str:
    """A hub snapshot holding the files of `patterns`, from the network or the local hub cache."""
    # Only here: the client takes as long to import as a folder takes to check.
    import huggingface_hub
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    ignored = ["*.bin", "*.pt", "*.msgpack", "*.h5"]
    try:
        return huggingface_hub.snapshot_download(
            model_id, allow_patterns=patterns, ignore_patterns=ignored
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"--model_id {model_id} is neither a folder nor a model the hub gives: {reason}"
        ) from error


# By safetensors' names.
_DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in (
        *(("BF16", ml_dtypes.bfloat16), ("F16", "f2"), ("F32", "f4"), ("F64", "f8")),
        *(("I64", "i8"), ("I32", "i4"), ("I16", "i2"), ("I8", "i1"), ("U8", "u1"), ("BOOL", "?")),
    )
}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where one weight lies, from the header of its safetensors file."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int  # of its first byte in the file

    def mapped(self) -> np.ndarray:
        """The tensor in the file itself, which is read where it is touched."""
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)

    def read(self) -> np.ndarray:
        """A copy of the tensor, in the file's dtype."""
        return np.array(self.mapped())


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor in the safetensors files of `folder` (one file, or shards with an index).

    Raises:
        ValueError: no safetensors weights, a missing shard, or a damaged file.
    """
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        weight_map = read_json_object(indices[0]).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{indices[0]} has no weight_map")
        files = [folder / str(name) for name in sorted(set(weight_map.values()))]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no .safetensors weights")
    tensors = {}
    for file in files:
        try:
            # Checks the header against the file's length.
            with safetensors.safe_open(file, "np"):
                tensors |= _header(file)
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"{file} is missing or damaged: {error}") from error
    return tensors


def _header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file: the length of a JSON text, the text, the data.

    Raises:
        ValueError: a tensor of a dtype that no weight has.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    tensors = {}
    for name, described in header.items():
        if name == "__metadata__":
            continue
        if described["dtype"] not in _DTYPES:
            raise ValueError(f"{file}: {name} is of dtype {described['dtype']}")
        offset = 8 + length + described["data_offsets"][0]
        shape, dtype = tuple(described["shape"]), _DTYPES[described["dtype"]]
        tensors[name] = StoredTensor(file, name, shape, dtype, offset)
    return tensors


def check_names_and_shapes(
    stored: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]], *, what: str
) -> None:
    """Holds the stored weights against the module's, and reports every difference at once.

    Raises:
        ValueError: listing all missing, extra and misshapen weights.
    """
    problems = [f"missing {name}" for name in sorted(expected.keys() - stored.keys())]
    problems += [f"extra {name}" for name in sorted(stored.keys() - expected.keys())]
    problems += [
        f"{name} is {list(stored[name].shape)}, not {list(expected[name])}"
        for name in sorted(expected.keys() & stored.keys())
        if stored[name].shape != tuple(expected[name])
    ]
    if problems:
        raise ValueError(f"the weights of {what} do not fit its config: " + "; ".join(problems))
