"""The JSON reader accepts valid files and refuses others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.errors import InputError
from runtime.json_files import MAX_BYTES, parse_json, parse_json_object, read_json, read_json_object

REFUSED = {
    "deep": (b"[" * 100_000, "nested deeper than 64"),
    "deep objects": (b'{"a":' * 100 + b"1" + b"}" * 100, "nested deeper than 64"),
    "repeated key": (b'{"a": 1, "a": 2}', "'a' is repeated"),
    "not a number": (b'{"a": NaN}', "NaN is no number"),
    "infinity": (b"[-Infinity]", "is no number"),
    "overflow": (b"[1e999]", "1e999 is too large"),
    "thousands of digits": (b"9" * 5000, "not valid JSON"),
    "byte order mark": (b"\xef\xbb\xbf{}", "byte order mark"),
    "UTF-16": ('{"a": "é"}'.encode("utf-16"), "not valid UTF-8"),
    "Latin-1": ('{"a": "é"}'.encode("latin-1"), "not valid UTF-8"),
    "lone surrogate": (b'{"a": "\\ud800"}', "not valid UTF-8"),
    "half": (b'{"a": ', "not valid JSON"),
    "empty": (b"", "not valid JSON"),
    "two": (b"{} {}", "not valid JSON"),
    "escape as a key": (b'{"\\u001b[31m": 1, "\\u001b[31m": 2}', "repeated"),
    "long": (b'"' + b"a" * 2000 + b'"', "longer than 1,000 bytes"),
}


@pytest.mark.parametrize("content, reason", REFUSED.values(), ids=REFUSED)
def test_refuses_in_one_printable_line(content: bytes, reason: str, tmp_path: Path):
    path = tmp_path / "x\x1b[31m.json"
    path.write_bytes(content)
    limit = 1000 if "longer" in reason else 1 << 20
    with pytest.raises(InputError) as refused:
        read_json(path, max_bytes=limit)
    message = str(refused.value)
    assert reason in message and "json" in message
    assert message.isprintable() and len(message) < 400


def test_reads_what_is_valid(tmp_path: Path):
    path = tmp_path / "a.json"
    text = r'{"a": [1, 2.5, null, "[[[[", "\ud83d\ude00 \"{"], "b": {"c": true}}'
    path.write_text(text, "utf-8")
    assert read_json_object(path) == {"a": [1, 2.5, None, "[[[[", '😀 "{'], "b": {"c": True}}
    assert parse_json("[" * 64 + "]" * 64, "text") is not None
    brackets = '"' + "[" * 10_000 + '"'
    assert parse_json(brackets, "text") == "[" * 10_000


@pytest.mark.parametrize("text", ["[]", "1", '"a"', "null"])
def test_takes_objects_only(text: str):
    with pytest.raises(InputError, match="the tag holds no JSON object"):
        parse_json_object(text, "the tag")


def test_takes_regular_files_only(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    os.symlink(tmp_path / "pipe", tmp_path / "link")
    os.symlink("itself", tmp_path / "itself")
    kinds = {"pipe": "a named pipe", "folder": "a folder", "link": "a named pipe"}
    for name, kind in kinds.items():
        with pytest.raises(InputError, match=f"{name} is {kind}"):
            read_json(tmp_path / name)
    with pytest.raises(InputError, match="/dev/zero is a device"):
        read_json(Path("/dev/zero"))
    for name in ("missing", "itself", "nul\0"):
        with pytest.raises(InputError, match="cannot read"):
            read_json(tmp_path / name)


_IN_ONE_GIB = """
import resource, sys
from pathlib import Path
from runtime.errors import InputError
from runtime.json_files import read_json
from runtime.tensor_files import read_header

resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
for read, path in zip([read_json, read_header, read_json, read_header], sys.argv[1:], strict=True):
    try:
        read(Path(path))
    except InputError as error:
        print(str(error).replace(path, "FILE"))
"""


def test_a_gibibyte_of_memory_reads_or_refuses_the_worst_files(tmp_path: Path):
    """Lists of empty lists are the text that takes the most memory."""
    worst = b"[" + b"[]," * (MAX_BYTES // 3 - 2) + b"0]"
    worst += b" " * (-len(worst) % 8)
    header = len(worst).to_bytes(8, "little")
    paths = [tmp_path / name for name in ("worst", "worst header", "terabyte", "terabytes")]
    for path, content in zip(paths, [worst, header + worst, b"{", header], strict=True):
        path.write_bytes(content)
    for path in paths[2:]:
        os.truncate(path, 1 << 40)
    command = [sys.executable, "-c", _IN_ONE_GIB, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "the header of FILE holds no JSON object",
        f"FILE is longer than {MAX_BYTES:,} bytes",
        "the header of FILE is not valid JSON: Expecting value: line 1 column 1 (char 0)",
    ]
