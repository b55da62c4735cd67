"""What a part of a model contains, as a digest that takes milliseconds.

A part is its configuration and its weights, wherever the folder lies and however the weights are
divided into files. Hashing 11 GB of weights would take longer than loading them, so the digest
covers the name, dtype and shape of every tensor, small tensors whole, and samples of large ones.
More training changes every sample.
"""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from runtime.errors import InputError
from runtime.files import open_regular
from runtime.fingerprint import fingerprint
from runtime.json_files import parse_json
from runtime.tensor_files import StoredTensor

_LENGTH = 16  # hexadecimal digits
_WHOLE_BYTES = 16 << 10  # tensors up to this size are hashed whole
_SAMPLES, _SAMPLE_BYTES = 4, 2048  # of larger ones, from the first byte to the last
_MAX_FILE_BYTES = 64 << 20  # tokenizers and configurations; 5 MB in the published models
_THREADS = 8  # a read from a cold disk waits 0.1 ms
# Facts about a file, not about the model.
_IGNORED_KEYS = ("_name_or_path", "_diffusers_version", "transformers_version")
_SUFFIXES = (".json", ".model", ".txt")


def digest_part(folder: Path, weights: Mapping[str, StoredTensor]) -> str:
    """Returns 16 hexadecimal digits that change with the content of one part of a model.

    Args:
        folder: of the part; its JSON, `.model` and `.txt` files count, but not a weight index.
        weights: its tensors; empty for a part without weights.

    Raises:
        InputError: a file cannot be read.
    """
    settings = {
        path.name: _digest_file(path)
        for path in sorted(folder.iterdir())
        if path.suffix in _SUFFIXES and not path.name.endswith(".index.json")
    }
    tensors = sorted(weights.values(), key=lambda tensor: tensor.name)
    with ThreadPoolExecutor(_THREADS) as pool:
        samples = list(pool.map(_digest_tensor, tensors))
    described = [
        [tensor.name, tensor.dtype.name, list(tensor.shape), sample]
        for tensor, sample in zip(tensors, samples, strict=True)
    ]
    return fingerprint([settings, described])[:_LENGTH]


def _digest_file(path: Path) -> str:
    """Hashes a file; a JSON object by its values, so that its layout does not count."""
    with open_regular(path) as file:
        content = file.read(_MAX_FILE_BYTES + 1)
    if len(content) > _MAX_FILE_BYTES:
        raise InputError(f"{path} is longer than {_MAX_FILE_BYTES:,} bytes")
    if path.name.endswith("config.json"):
        value = parse_json(content, str(path))
        if isinstance(value, dict):
            return fingerprint({k: v for k, v in value.items() if k not in _IGNORED_KEYS})
    return hashlib.sha256(content).hexdigest()


def _digest_tensor(tensor: StoredTensor) -> str:
    digest = hashlib.sha256()
    size = tensor.num_bytes
    with open_regular(tensor.file) as file:
        if size <= _WHOLE_BYTES:
            digest.update(os.pread(file.fileno(), size, tensor.offset))
        else:
            for i in range(_SAMPLES):
                start = (size - _SAMPLE_BYTES) * i // (_SAMPLES - 1)
                digest.update(os.pread(file.fileno(), _SAMPLE_BYTES, tensor.offset + start))
    return digest.hexdigest()
