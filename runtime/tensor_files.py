"""safetensors files: the headers of weights, and files of this project with a digest inside.

A safetensors file is the length of a JSON header in 8 bytes, the header, and the tensors' bytes
one after the other. `write_tensors` adds two digests to the header's metadata, which `check_header`
and `TensorFile.read` compare: of the header itself and of the bytes after it.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from runtime.errors import InputError
from runtime.files import atomic_path, open_regular
from runtime.fingerprint import fingerprint
from runtime.json_files import MAX_BYTES, parse_json_object
from runtime.text import printable

# By safetensors' names.
DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in (
        *(("BF16", ml_dtypes.bfloat16), ("F16", "f2"), ("F32", "f4"), ("F64", "f8")),
        *(("I64", "i8"), ("I32", "i4"), ("I16", "i2"), ("I8", "i1"), ("U8", "u1"), ("BOOL", "?")),
    )
}
FLOAT_DTYPES = frozenset(DTYPES[name] for name in ("BF16", "F16", "F32", "F64"))
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Reads a slice of an array, possibly with its rows in another order.
RowReader = Callable[[np.ndarray, tuple[slice, ...]], np.ndarray]

_HEADER_DIGEST, _DATA_DIGEST = "header_sha256", "data_sha256"


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where one weight lies, from the header of its safetensors file."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int  # of its first byte in the file

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def mapped(self) -> np.ndarray:
        """The tensor in the file itself, which is read where it is touched."""
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)

    def part(self, index: tuple[slice, ...], read_rows: RowReader) -> np.ndarray:
        """The part of the tensor that a device gets; it may lie in the file itself."""
        return read_rows(self.mapped(), index)

    def read(self) -> np.ndarray:
        """A copy of the tensor, in the file's dtype."""
        return np.array(self.mapped())


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose header was checked.

    Attributes:
        metadata: the texts of the header.
        data_offset: of the first tensor's first byte.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    data_offset: int

    def read(self) -> dict[str, np.ndarray]:
        """Reads every tensor of a file that `write_tensors` wrote.

        Raises:
            InputError: the bytes are not those that were written.
        """
        with open_regular(self.path) as file:
            content = file.read()
        digest = hashlib.sha256(memoryview(content)[self.data_offset :]).hexdigest()
        if digest != self.metadata.get(_DATA_DIGEST):
            raise InputError(f"{printable(str(self.path))} is damaged: its checksum does not match")
        return {
            name: np.frombuffer(
                content, tensor.dtype, math.prod(tensor.shape), tensor.offset
            ).reshape(tensor.shape)
            for name, tensor in self.tensors.items()
        }


def read_header(path: Path) -> TensorFile:
    """Reads and checks the header of any safetensors file; reads no tensor.

    Raises:
        InputError: it cannot be read, or is no whole safetensors file.
    """
    name = printable(str(path))
    with open_regular(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_BYTES):
            raise InputError(f"{name} is truncated or not a safetensors file")
        header = parse_json_object(file.read(length), f"the header of {path}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError(f"the header of {name} has metadata that are no texts")
    tensors, end = {}, 0
    try:
        entries = [(key, *_tensor_entry(key, value)) for key, value in header.items()]
        for key, dtype, shape, start, stop in sorted(entries, key=lambda entry: entry[3:]):
            if start != end:
                raise ValueError(f"{key!r} begins at {start}, not {end}")
            if stop - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{key!r} has {stop - start} bytes for {list(shape)} {dtype}")
            tensors[key] = StoredTensor(path, key, shape, dtype, 8 + length + start)
            end = stop
    except ValueError as error:
        raise InputError(f"the header of {name} is damaged: {printable(str(error))}") from error
    if 8 + length + end != size:
        raise InputError(
            f"{name} is truncated or damaged: it has {size} bytes, its header says "
            f"{8 + length + end}"
        )
    return TensorFile(path, tensors, metadata, 8 + length)


def _tensor_entry(name: str, entry: object) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Returns the dtype, shape, first byte and end of one tensor.

    Raises:
        ValueError: the entry has other keys or types.
    """
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name[:80]!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name[:80]!r} is of dtype {str(dtype)[:80]}")
    if not _are_counts(shape) or len(shape) > 32:
        raise ValueError(f"{name[:80]!r} has shape {str(shape)[:80]}")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{name[:80]!r} has data_offsets {str(offsets)[:80]}")
    return DTYPES[dtype], tuple(shape), offsets[0], offsets[1]


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 62 for v in values)


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file with its digests, atomically.

    Equal tensors and metadata give equal files, whose checksums can be compared.

    Raises:
        WriteError: the disk refuses.
    """
    header: dict[str, object] = {}
    chunks, offset = [], 0
    # Larger items first, as safetensors does: every tensor then starts at a multiple of its own.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    data = hashlib.sha256()
    for name, tensor in ordered:
        chunk = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data
        entry = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = {**entry, "data_offsets": [offset, offset + chunk.nbytes]}
        data.update(chunk)
        chunks.append(chunk)
        offset += chunk.nbytes
    stamp = dict(sorted({**metadata, _DATA_DIGEST: data.hexdigest()}.items()))
    digest = fingerprint({"__metadata__": stamp, **header}, compact=True)
    header = {"__metadata__": {**stamp, _HEADER_DIGEST: digest}, **header}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at multiples of 8 bytes
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for chunk in chunks:
            file.write(chunk)


def check_header(file: TensorFile) -> None:
    """Checks that the header of a file is the one that `write_tensors` wrote.

    Raises:
        InputError: it is not.
    """
    metadata = {key: value for key, value in file.metadata.items() if key != _HEADER_DIGEST}
    header = {
        name: {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [
                tensor.offset - file.data_offset,
                tensor.offset - file.data_offset + tensor.num_bytes,
            ],
        }
        for name, tensor in file.tensors.items()
    }
    digest = fingerprint({"__metadata__": metadata, **header}, compact=True)
    if digest != file.metadata.get(_HEADER_DIGEST):
        raise InputError(
            f"{printable(str(file.path))} is damaged: its header is not as it was written"
        )
