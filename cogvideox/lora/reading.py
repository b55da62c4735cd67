"""Reading and checking of a LoRA file: which weights of a transformer it changes, and how much.

Only safetensors files are read, never pickles, which can run code. Everything is checked here, also
that every value is finite, so that nothing can be wrong with a LoRA once the weights load.
"""

import collections
import dataclasses
import hashlib
import mmap
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from cogvideox.lora.names import Key, Modules, Part
from cogvideox.lora.scales import ADAPTER_CONFIG, PeftSettings, positive, read_peft_settings
from cogvideox.model.config import TransformerConfig
from cogvideox.transformer.parameters import BLOCKS, parameter_table, stored_names
from runtime.errors import InputError
from runtime.files import open_regular
from runtime.json_files import parse_json_object
from runtime.tensor_files import FLOAT_DTYPES, StoredTensor, TensorFile, read_header
from runtime.text import printable

_ADAPTER_FILE = "adapter_model.safetensors"
_HEADER_SETTINGS = "lora_adapter_metadata"  # diffusers', in the header
_MAX_CONFIG_BYTES = 4 << 20
_BLOCK_BYTES = 8 << 20  # read by one thread at a time
_THREADS = 8
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80")  # torch's archives, and bare pickles


@dataclasses.dataclass(frozen=True)
class Update:
    """What a LoRA adds to one weight: scale * up @ down.

    Attributes:
        down: [R, I], or the weight's own shape after R for a convolution.
        up: [O, R], with axes of length 1 after R for a convolution.
        scale: without the user's weight.
    """

    down: StoredTensor
    up: StoredTensor
    alpha: float | None
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclasses.dataclass(frozen=True)
class LoraFile:
    """A checked LoRA file.

    Attributes:
        sha256: of the file.
        settings_sha256: of the adapter_config.json that was used; None if none was.
        format: whose names it has.
        alphas_from: where the alphas are; None if there are none.
        updates: by the names of the weights in the model's files.
        state: what `is_current` compares.
    """

    path: Path
    sha256: str
    settings_sha256: str | None
    format: str
    alphas_from: str | None
    updates: Mapping[str, Update]
    state: tuple[int, ...]

    @property
    def parameters(self) -> frozenset[str]:
        """The names of the changed parameters, as in `parameter_table`."""
        return frozenset(re.sub(rf"^{BLOCKS}\d+\.", BLOCKS, name) for name in self.updates)

    def is_current(self) -> bool:
        """Whether the file is still the one that was read, by its size and time."""
        try:
            return self.state == _file_state(self.path)
        except OSError:
            return False

    def describe(self, weight: float) -> str:
        """The file's format, targets, ranks, alphas, and the factor that results, in one line."""
        updates = self.updates.values()
        targets = sorted({name.removeprefix(BLOCKS) for name in self.parameters})
        shown = ", ".join(target.removesuffix(".weight") for target in targets)
        alphas = "no alpha in the file (factor 1)"
        if self.alphas_from:
            alphas = f"{_range('alpha', [u.alpha or 0 for u in updates])} ({self.alphas_from})"
        return (
            f"LoRA {self.path.name}: {self.format}, {len(updates)} layers ({shown}), "
            f"{_range('rank', [update.rank for update in updates])}, {alphas}, weight {weight:g}: "
            f"{_range('scale', [weight * update.scale for update in updates])}"
        )


def _range(name: str, values: Sequence[float]) -> str:
    least, most = min(values), max(values)
    return f"{name} {least:.4g}" if least == most else f"{name} {least:.4g} to {most:.4g}"


def _file_state(path: Path) -> tuple[int, ...]:
    """Numbers that change when a LoRA file or its adapter_config.json changes."""
    beside = path.parent / ADAPTER_CONFIG
    stats = [os.stat(path), *([os.stat(beside)] if beside.exists() else [])]
    return tuple(n for s in stats for n in (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns))


def read_lora(path: Path, config: TransformerConfig) -> LoraFile:
    """Reads a LoRA file for a transformer; its tensors stay on the disk.

    Raises:
        ValueError: the file cannot be read, or is no LoRA that can be added to this transformer;
            one line with the name of the file, and of the key that is wrong.
    """
    tensors = _read_header(path)
    state = _file_state(path)
    try:
        settings, alphas_from, settings_sha256 = _find_settings(tensors)
        _check_base_model(settings, config)
        format_, updates = _find_updates(tensors.tensors, settings, config)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{printable(str(path))}: {printable(str(error))}") from error
    if not settings and any(update.alpha for update in updates.values()):
        alphas_from = "in the file"
    return LoraFile(
        path, _check_values(tensors), settings_sha256, format_, alphas_from, updates, state
    )


def _read_header(path: Path) -> TensorFile:
    try:
        return read_header(path)
    except InputError as error:
        with open_regular(path) as file:
            start = file.read(4)
        if start.startswith(_PICKLE_STARTS):
            raise InputError(
                f"{printable(str(path))} is a pickle, which can run code when it is read; convert "
                "it to safetensors"
            ) from error
        raise


def _find_settings(
    file: TensorFile,
) -> tuple[PeftSettings | None, str | None, str | None]:
    """Returns peft's settings, where they are from, and the sha256 of a file of them.

    Raises:
        ValueError: they are damaged, or ask for more than a plain LoRA.
    """
    text = file.metadata.get(_HEADER_SETTINGS)
    if text is not None:
        values = parse_json_object(text.encode(), f"{_HEADER_SETTINGS} of {file.path}")
        prefix = "transformer."  # diffusers'; settings of the text encoder have another
        own = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
        return read_peft_settings(own or values), "header", None
    path = file.path.parent / ADAPTER_CONFIG
    beside = [other.name for other in file.path.parent.glob("*.safetensors")]
    if not path.exists() or (file.path.name != _ADAPTER_FILE and len(beside) > 1):
        return None, None, None
    with open_regular(path) as config:
        content = config.read(_MAX_CONFIG_BYTES + 1)
    if len(content) > _MAX_CONFIG_BYTES:
        raise ValueError(f"{path} is longer than {_MAX_CONFIG_BYTES:,} bytes")
    try:
        settings = read_peft_settings(parse_json_object(content, str(path)))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{printable(str(path))}: {error}") from error
    return settings, ADAPTER_CONFIG, hashlib.sha256(content).hexdigest()


def _check_base_model(settings: PeftSettings | None, config: TransformerConfig) -> None:
    """Checks the name of the model that was trained: shapes do not tell 1.0-5B from 1.5-5B.

    Raises:
        ValueError: it is of another generation.
    """
    name = settings.base_model if settings else None
    match = re.search(r"cogvideox-?(1\.5|[25]b)", (name or "").lower())
    if match and (match[1] == "1.5") != (config.patch_size_t is not None):
        own = "1.0" if config.patch_size_t is None else "1.5"
        raise ValueError(f"it was trained on {str(name)[:80]}; this model is of CogVideoX {own}")


def _find_updates(
    tensors: Mapping[str, StoredTensor], settings: PeftSettings | None, config: TransformerConfig
) -> tuple[str, dict[str, Update]]:
    """Returns the name of the format, and the updates by stored weight.

    Raises:
        ValueError: a tensor is no part of a LoRA of this transformer; names the key.
    """
    weights = _weights(config)
    modules = Modules(weights, config.num_layers)
    formats: dict[str, None] = {}
    parts: dict[str, dict[Part, tuple[Key, StoredTensor]]] = collections.defaultdict(dict)
    for name, tensor in tensors.items():
        try:
            key = modules.read(name)
            if key.part in parts[key.module]:
                raise ValueError(f"{parts[key.module][key.part][1].name[:200]} is the same part")
        except ValueError as error:
            raise ValueError(f"{name[:200]}: {error}") from error
        formats[key.format] = None
        parts[key.module][key.part] = key, tensor
    if not parts:
        raise ValueError("it holds no tensor")
    updates = {
        f"{module}.weight": _make_update(module, own, settings, weights[module])
        for module, own in parts.items()
    }
    return " and ".join(formats), updates


def _weights(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights that a LoRA may change, by module."""
    found = {}
    for name, parameter in parameter_table(config).items():
        if parameter.lora:
            shape = parameter.shape[1:] if name.startswith(BLOCKS) else parameter.shape
            for stored in stored_names(name, parameter):
                found[stored.removesuffix(".weight")] = shape
    return found


def _make_update(
    module: str,
    parts: Mapping[Part, tuple[Key, StoredTensor]],
    settings: PeftSettings | None,
    shape: tuple[int, ...],
) -> Update:
    """Raises ValueError, with the key, if the parts make no update of a weight of this shape."""
    for part, other in (("down", "up"), ("up", "down")):
        if part not in parts:
            key = next(iter(parts.values()))[1].name
            beside = f"{key[:200]}: there is no {part} factor beside it"
            raise ValueError(beside if other in parts else f"{key[:200]}: it stands alone")
    (key, down), (_, up) = parts["down"], parts["up"]
    rank = down.shape[0] if down.shape else 0
    after_rank = (1,) * (len(shape) - 2)
    for tensor, expected in ((down, (rank, *shape[1:])), (up, (shape[0], rank, *after_rank))):
        if tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{tensor.name[:200]} is of dtype {tensor.dtype}, not a float")
        if tensor.shape != expected or not rank:
            asked = ["rank" if n == rank else n for n in expected]
            raise ValueError(
                f"{tensor.name[:200]} is {list(tensor.shape)}, this transformer takes "
                f"[{', '.join(map(str, asked))}]; the LoRA is of another model"
            )
    alpha, scale = None, 1 / rank if key.from_sat else 1.0
    try:
        if settings:
            alpha, scale = settings.alpha_of(module), settings.scale_of(module, rank)
        elif "alpha" in parts:
            alpha = _read_alpha(parts["alpha"][1])
            scale = alpha / rank
    except ValueError as error:
        raise ValueError(f"{down.name[:200]}: {error}") from error
    return Update(down, up, alpha, scale)


def _read_alpha(tensor: StoredTensor) -> float:
    if tensor.shape not in ((), (1,)):
        raise ValueError(f"its alpha has shape {list(tensor.shape)}")
    with open_regular(tensor.file) as file:
        content = os.pread(file.fileno(), tensor.num_bytes, tensor.offset)
    return positive("alpha", float(np.frombuffer(content, tensor.dtype)[0]))


def _check_values(file: TensorFile) -> str:
    """Returns the sha256 of a file.

    Raises:
        InputError: a value is NaN or infinite; names the key.
    """
    with (
        open_regular(file.path) as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        hashing = pool.submit(lambda: hashlib.sha256(content).hexdigest())
        checks = pool.map(partial(_is_finite, content), file.tensors.values())
        for tensor, finite in zip(file.tensors.values(), checks, strict=True):
            if not finite:
                name = printable(tensor.name[:200])
                raise InputError(f"{printable(str(file.path))}: {name} holds NaN or infinity")
        return hashing.result()


def _is_finite(content: mmap.mmap, tensor: StoredTensor) -> bool:
    if tensor.dtype not in FLOAT_DTYPES:
        return True
    size = tensor.dtype.itemsize
    bits = {2: np.uint16, 4: np.uint32, 8: np.uint64}[size]
    # The bits of an infinity are those of the exponent, all 1 in NaN too.
    exponent = np.array(np.inf, tensor.dtype).view(bits)
    step = _BLOCK_BYTES // size
    count = tensor.num_bytes // size
    for start in range(0, count, step):
        offset = tensor.offset + start * size
        block = np.frombuffer(content, bits, min(step, count - start), offset)
        if bool(((block & exponent) == exponent).any()):
            return False
    return True
