"""Checksums cover the headers and data of safetensors files."""

from pathlib import Path

import numpy as np
import pytest

from runtime.errors import InputError
from runtime.tensor_files import check_header, read_header, write_tensors

TENSORS = {
    "latents": np.arange(6, dtype=np.float32).reshape(2, 3),
    "x0": np.arange(6, dtype=np.float32).reshape(3, 2),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_tensors(tmp_path / "file", TENSORS, {"fingerprint": "0123"})
    return tmp_path / "file"


def test_what_is_written_is_read(path: Path):
    file = read_header(path)
    check_header(file)
    assert file.metadata["fingerprint"] == "0123"
    for name, tensor in file.read().items():
        np.testing.assert_array_equal(tensor, TENSORS[name])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"shape":[2,3]', b'"shape":[3,2]'),
        (b'"shape":[2,3]', b'"shape":[1,6]'),
        (b'"dtype":"F32"', b'"dtype":"I32"'),
        (b'"x0"', b'"x1"'),
        (b'"fingerprint":"0123"', b'"fingerprint":"0124"'),
        (b'"fingerprint"', b'"fingerprinT"'),
    ],
)
def test_a_changed_header_is_seen(old: bytes, new: bytes, path: Path):
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))
    file = read_header(path)  # it is well-formed
    with pytest.raises(InputError, match="its header is not as it was written"):
        check_header(file)


def test_changed_data_is_seen(path: Path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    file = read_header(path)
    check_header(file)
    with pytest.raises(InputError, match="its checksum does not match"):
        file.read()
