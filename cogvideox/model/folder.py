"""A model folder in diffusers layout: location, configuration and weight files.

Models are checked here from JSON files and safetensors headers only, before weights are read.
"""

import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from cogvideox.model.config import (
    SchedulerConfig,
    TransformerConfig,
    VaeConfig,
)
from cogvideox.model.digest import digest_part
from cogvideox.model.hub import download, names_a_folder
from runtime.files import check_regular
from runtime.json_files import read_json_object
from runtime.tensor_files import FLOAT_DTYPES, StoredTensor, read_header
from runtime.text import printable

MODEL_PARTS = ("tokenizer", "text_encoder", "transformer", "scheduler", "vae")
WEIGHTED_PARTS = ("text_encoder", "transformer", "vae")
_MOST_PROBLEMS = 8  # most problems with weights that one message lists


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A model on disk in diffusers layout.

    Two folders hold the same model if the digests of their parts are equal.
    """

    model_id: str  # what the user gave: a hub id, or the folder's absolute path
    revision: str | None  # hub commit; None for a folder
    path: Path

    @cached_property
    def transformer(self) -> TransformerConfig:
        """Configuration of the transformer; the file is read once."""
        return TransformerConfig.from_file(self.path / "transformer" / "config.json")

    @cached_property
    def vae(self) -> VaeConfig:
        """Configuration of the VAE."""
        return VaeConfig.from_file(self.path / "vae" / "config.json")

    @cached_property
    def scheduler(self) -> SchedulerConfig:
        """Configuration of the scheduler."""
        return SchedulerConfig.from_file(self.path / "scheduler" / "scheduler_config.json")

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {}

    def digest(self, part: str) -> str:
        """Returns a digest of the contents of `part`, 16 hexadecimal digits; computed once.

        Raises:
            ValueError: a file of the part is missing or damaged.
        """
        if part not in self._digests:
            folder = self.path / part
            weights = stored_tensors(folder) if part in WEIGHTED_PARTS else {}
            self._digests[part] = digest_part(folder, weights)
        return self._digests[part]

    def digests(self, parts: Sequence[str]) -> dict[str, str]:
        """Returns the digests of those of `parts` that are complete and undamaged.

        The stage that loads a part reads it again and reports what is wrong with it.
        """
        found = {}
        for part in parts:
            with contextlib.suppress(ValueError, OSError):
                found[part] = self.digest(part)
        return found

    def component_class(self, part: str) -> str:
        """Returns the class in model_index.json for `part`, such as "T5EncoderModel"."""
        index = read_json_object(self.path / "model_index.json")
        entry = index.get(part)
        if not (isinstance(entry, list) and len(entry) == 2 and entry[1]):
            raise ValueError(f"{self.path / 'model_index.json'} names no class for {part!r}")
        return str(entry[1])


def find_model(model_id: str, parts: Sequence[str]) -> ModelFolder:
    """Finds the model; checks that its JSON files and the folders of `parts` exist.

    Args:
        model_id: a folder in diffusers layout or a Hugging Face hub id; of the latter only `parts`
            are downloaded to, or read from, the hub cache.
        parts: the sub-folders this stage loads.

    Raises:
        ValueError: there is no such model, or a part of it is missing.
    """
    try:
        path = Path(model_id).expanduser()
    except RuntimeError as error:  # "~name" of a user that does not exist
        raise ValueError(f"--model_id {model_id}: {error}") from error
    if os.path.isdir(path):  # unlike Path.is_dir, false for invalid names
        model = ModelFolder(str(path.resolve()), None, path.resolve())
    else:
        if names_a_folder(model_id):
            raise ValueError(f"--model_id {model_id}: there is no such folder")
        patterns = ["*.json", *(f"{part}/*" for part in parts)]
        snapshot = download("--model_id", model_id, patterns, what="folder")
        model = ModelFolder(model_id, snapshot.name, snapshot)
    for part in parts:
        model.component_class(part)
        if not (model.path / part).is_dir():
            raise ValueError(f"model {model_id} has no folder {part}/")
        for file in (model.path / part).iterdir():
            if not file.is_dir():
                check_regular(file)  # libraries open files by name; a pipe would block them
    return model


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Returns every tensor in the safetensors files of `folder`: one file, or shards and an index.

    Raises:
        ValueError: there are no safetensors weights, a shard is missing, or a file is damaged.
    """
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        weight_map = read_json_object(indices[0]).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{indices[0]} has no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
        foreign = [name for name in names if Path(name).name != name]
        if foreign:
            raise ValueError(f"{indices[0]} names a file elsewhere: {printable(foreign[0])}")
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no .safetensors weights")
    tensors = {}
    for file in files:
        tensors |= read_header(file).tensors
    return tensors


def check_headers(
    stored: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]], *, what: str
) -> None:
    """Compares the stored weights' names and shapes with the module's, and requires floats.

    Raises:
        ValueError: weights are missing, extra, of the wrong shape or no floating-point numbers; the
            message lists them.
    """
    problems = [f"missing {name}" for name in sorted(expected.keys() - stored.keys())]
    problems += [f"extra {name}" for name in sorted(stored.keys() - expected.keys())]
    problems += [
        f"{name} is {list(stored[name].shape)}, not {list(expected[name])}"
        for name in sorted(expected.keys() & stored.keys())
        if stored[name].shape != tuple(expected[name])
    ]
    problems += [
        f"{name} is of dtype {stored[name].dtype}, not a floating-point one"
        for name in sorted(expected.keys() & stored.keys())
        if stored[name].dtype not in FLOAT_DTYPES
    ]
    if problems:
        more = len(problems) - _MOST_PROBLEMS
        shown = "; ".join(printable(problem[:200]) for problem in problems[:_MOST_PROBLEMS])
        shown += f"; and {more} more" if more > 0 else ""
        raise ValueError(f"the weights of {what} do not fit its config: {shown}")
