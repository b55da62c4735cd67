"""LoRAs of a run: what the user names, where the files are, and what the run's records say of them.

A `LoraChoice` is one file with a weight. It is what `--lora` gives, and, with the file's sha256,
what generation_config.json and jobs record: the sha256 and the weight decide a result, the place of
the file does not. `LoraLibrary` reads the files; `Loras` is what a run adds to its weights.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogvideox.lora.scales import ADAPTER_CONFIG
from runtime import processes
from runtime.files import checksum
from runtime.text import printable
from stages.sections import without_places

if TYPE_CHECKING:
    from cogvideox.lora.reading import LoraFile
    from cogvideox.model.folder import ModelFolder
    from runtime.tensor_files import StoredTensor

_MOST_WEIGHT = 100.0
_MOST_LORAS = 16
_MOST_FILES = 200  # of a folder, to look for a file by its sha256
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
# Names that trainers give their files; the hub's repositories hold other files, too.
_USUAL_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")


@dataclasses.dataclass(frozen=True)
class LoraChoice:
    """A LoRA file and its weight.

    Attributes:
        file: a path, or HUB_ID or HUB_ID:FILE.
        sha256: of the file; None takes any file.
        settings_sha256: of the adapter_config.json beside it; None if none is used.
    """

    file: str
    weight: float = 1.0
    sha256: str | None = None
    settings_sha256: str | None = None

    @property
    def shown(self) -> str:
        """The file's name and weight, for people."""
        name = Path(self.file).name
        return name if self.weight == 1 else f"{name} ({self.weight:g})"

    def to_json(self) -> dict[str, Any]:
        """Returns an object with what is known; `read_choices` inverts it."""
        return {name: value for name, value in vars(self).items() if value is not None}


def parse_choice(text: str) -> LoraChoice:
    """Reads FILE or FILE=WEIGHT; a file's name may hold "=", too.

    Raises:
        ValueError: there is no file, or the weight is no usable number.
    """
    file, equals, number = text.rpartition("=")
    try:
        weight = float(number) if equals else 1.0
    except ValueError:
        equals, weight = "", 1.0
    file = file if equals else text
    if not file.strip():
        raise ValueError(f"--lora {printable(text)!r} names no file")
    if not abs(weight) <= _MOST_WEIGHT:  # also refuses NaN
        raise ValueError(f"--lora {printable(text)}: the weight must be from -100 to 100")
    return LoraChoice(file, weight)


def read_choices(value: object) -> tuple[LoraChoice, ...]:
    """Reads what generation_config.json or a job says of LoRAs; None is no LoRA.

    Raises:
        ValueError: it is not what `LoraChoice.to_json` makes, of read files.
    """
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > _MOST_LORAS:
        raise ValueError(f"lora is {printable(str(value))[:80]}, not a list of files")
    return tuple(_read_choice(one) for one in value)


def _read_choice(value: object) -> LoraChoice:
    names = {field.name for field in dataclasses.fields(LoraChoice)}
    if isinstance(value, Mapping) and value.keys() <= names:
        choice = LoraChoice(**{"file": None, "weight": None, **value})
        hashes = [choice.sha256, *([choice.settings_sha256] if choice.settings_sha256 else [])]
        if (
            isinstance(choice.file, str)
            and type(choice.weight) in (int, float)
            and math.isfinite(choice.weight)
            and all(isinstance(one, str) and _SHA256.fullmatch(one) for one in hashes)
        ):
            return choice
    raise ValueError(f"lora is {printable(str(value))[:80]}, not what stage 2 writes")


@dataclasses.dataclass(frozen=True)
class Loras:
    """The LoRAs of a run, read and checked, in the order in which the user names them."""

    choices: tuple[LoraChoice, ...] = ()
    files: tuple[LoraFile, ...] = ()

    @property
    def parameters(self) -> frozenset[str]:
        """The names of the transformer's parameters that they change."""
        return frozenset().union(*(file.parameters for file in self.files))

    def parameters_changed_from(self, other: Loras) -> frozenset[str]:
        """The names of the parameters whose values may differ with these and other LoRAs."""
        mine, theirs = self._hashes, other._hashes
        return frozenset() if mine == theirs else self.parameters | other.parameters

    @property
    def _hashes(self) -> Any:
        return without_places(self.to_json())

    def to_json(self) -> list[dict[str, Any]]:
        return [choice.to_json() for choice in self.choices]

    def settings(self) -> dict[str, Any]:
        """What the section of stage 2 says of them; nothing without any."""
        return {"lora": self.to_json()} if self.choices else {}

    def describe(self) -> list[str]:
        """A line for each LoRA."""
        chosen = zip(self.files, self.choices, strict=True)
        return [printable(file.describe(choice.weight)) for file, choice in chosen]

    def merged(self, stored: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
        """Returns a model's stored weights with these LoRAs; see `cogvideox.lora.merging`."""
        if not self.choices:
            return stored
        from cogvideox.lora.merging import merged

        weights = [choice.weight for choice in self.choices]
        return merged(stored, list(zip(self.files, weights, strict=True)))


class LoraLibrary:
    """Reads LoRA files for one model, each once until it changes."""

    def __init__(self, model: ModelFolder):
        self._model = model
        self._files: dict[Path, LoraFile] = {}

    def resolve(self, choices: Sequence[LoraChoice]) -> Loras:
        """Reads and checks the files.

        Raises:
            ValueError: a file is missing, is no LoRA for the model, has another sha256 than its
                choice says, or is named twice.
        """
        if len(choices) > _MOST_LORAS:
            raise ValueError(f"--lora: {len(choices)} files; at most {_MOST_LORAS} can be added")
        files = [self._read(find_file(choice.file)) for choice in choices]
        resolved = []
        for choice, file in zip(choices, files, strict=True):
            if choice.sha256:
                _check_same(file, choice)
            hashes = {"sha256": file.sha256, "settings_sha256": file.settings_sha256}
            resolved.append(dataclasses.replace(choice, file=_place(choice.file), **hashes))
        for i, file in enumerate(files):
            if file.sha256 in [other.sha256 for other in files[:i]]:
                raise ValueError(
                    f"--lora {printable(choices[i].file)} is given twice; add up its weights"
                )
        if resolved:
            hashes = [f"{one.sha256} {one.settings_sha256}" for one in resolved]
            processes.check_alike({"LoRA files": hashes})
        return Loras(tuple(resolved), tuple(files))

    def _read(self, path: Path) -> LoraFile:
        from cogvideox.lora.reading import read_lora

        known = self._files.get(path)
        if known is None or not known.is_current():
            self._files[path] = read_lora(path, self._model.transformer)
        return self._files[path]


def _check_same(file: LoraFile, choice: LoraChoice) -> None:
    """Raises ValueError if a file, or the settings beside it, are not those of a choice."""
    for what, was, now in (
        ("", choice.sha256, file.sha256),
        (f"'s {ADAPTER_CONFIG}", choice.settings_sha256, file.settings_sha256),
    ):
        if was != now:
            was, now = (digest[:12] if digest else "not used" for digest in (was, now))
            raise ValueError(
                f"--lora {printable(choice.file)}{what} has changed: its sha256 was {was}, now it "
                f"is {now}"
            )


def locate(choices: Sequence[LoraChoice], places: Sequence[Path]) -> list[LoraChoice]:
    """Finds the files of recorded choices again, by their sha256.

    Args:
        places: files, and folders of them, to look at if a file is not where it was.

    Raises:
        ValueError: a file is not found; the message says which, and where it was looked for.
    """
    digests: dict[Path, str] = {}
    return [_locate(choice, places, digests) for choice in choices]


def _locate(choice: LoraChoice, places: Sequence[Path], digests: dict[Path, str]) -> LoraChoice:
    try:
        looked = [find_file(choice.file)]
        problem = "is another file now"
    except ValueError as error:
        looked, problem = [], str(error).removeprefix("--lora ")
    for place in (*places, Path(choice.file).parent):
        looked += sorted(place.glob("*.safetensors"))[:_MOST_FILES] if place.is_dir() else [place]
    for path in looked:
        if path.is_file():
            if path not in digests:
                digests[path] = checksum(path)
            if digests[path] == choice.sha256:
                return dataclasses.replace(choice, file=str(path))
    raise ValueError(
        f"the LoRA {printable(choice.shown)} of this video (sha256 {str(choice.sha256)[:12]}) is "
        f"missing: {problem}; name its place with --lora"
    )


def _place(file: str) -> str:
    """What records say of the place of a file: the absolute path, or the hub id."""
    path = Path(file).expanduser()
    return str(path.resolve()) if os.path.lexists(path) else file


def find_file(file: str) -> Path:
    """Finds the file of a LoRA: a path, a folder that holds one, HUB_ID, or HUB_ID:FILE.

    Raises:
        ValueError: there is no such file, or a folder holds several.
    """
    try:
        path = Path(file).expanduser()
    except RuntimeError as error:  # "~name" of a user that does not exist
        raise ValueError(f"--lora {printable(file)}: {error}") from error
    if os.path.isdir(path):
        return _only_file(path, file)
    if os.path.lexists(path):
        return path
    from cogvideox.model.hub import download, names_a_folder

    hub_id, _, name = file.partition(":")
    if hub_id.endswith(".safetensors") or names_a_folder(hub_id) or ".." in Path(name).parts:
        raise ValueError(f"--lora {printable(file)}: there is no such file")
    names = [name] if name else list(_USUAL_FILES)
    settings = f"{name.rpartition('/')[0]}/{ADAPTER_CONFIG}".lstrip("/")
    snapshot = download("--lora", hub_id, [*names, settings], what="file")
    if not name:
        return _only_file(snapshot, file)
    if not (snapshot / name).is_file():
        raise ValueError(f"--lora {printable(file)}: {hub_id} has no file {printable(name)}")
    return snapshot / name


def _only_file(folder: Path, file: str) -> Path:
    found = sorted(folder.glob("*.safetensors"))
    usual = [path for path in found if path.name in _USUAL_FILES]
    if len(found) != 1 and len(usual) != 1:
        names = ", ".join(path.name for path in found[:8]) or "none"
        raise ValueError(
            f"--lora {printable(file)} holds {len(found)} .safetensors files ({printable(names)}); "
            "name one"
        )
    return (usual or found)[0]
