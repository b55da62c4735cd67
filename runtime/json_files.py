"""The reader of all JSON: files, tags and messages that others may have damaged or made up.

It limits size and depth, takes UTF-8 only, and refuses what Python's reader lets through: repeated
keys, NaN and infinity, lone surrogates. Every refusal is one line that names the source.
"""

import json
import math
import re
from pathlib import Path
from typing import NoReturn

from runtime.errors import InputError
from runtime.files import open_regular
from runtime.text import printable

# The header of 130,000 tensors; CogVideoX has 1,000. Lists of empty lists take 28 times their text
# in memory, here 450 MiB.
MAX_BYTES = 16 << 20
MAX_DEPTH = 64

_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"', re.DOTALL)
_BRACKET = re.compile(r"[][{}]")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SHOWN = 80  # characters of a foreign text in a message


def read_json(path: Path, *, max_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH) -> object:
    """Reads a JSON file.

    Raises:
        InputError: it cannot be read, is no regular file, or is refused by `parse_json`.
    """
    with open_regular(path) as file:
        try:
            content = file.read(max_bytes + 1)
        except OSError as error:
            raise InputError(f"cannot read {_name(path)}: {error.strerror}") from error
    return parse_json(content, str(path), max_bytes=max_bytes, max_depth=max_depth)


def read_json_object(
    path: Path, *, max_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH
) -> dict[str, object]:
    """Reads a JSON file that holds an object; see `read_json`."""
    value = read_json(path, max_bytes=max_bytes, max_depth=max_depth)
    return _object_only(value, str(path))


def parse_json(
    text: str | bytes, what: str, *, max_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH
) -> object:
    """Parses JSON.

    Args:
        text: JSON; bytes must be UTF-8 without a byte order mark.
        what: the source, for messages; it is made printable.

    Raises:
        InputError: it is too long, nested too deep, not UTF-8 or not JSON, an object repeats a
            key, or it holds NaN, infinity, a lone surrogate or an integer of thousands of digits.
    """
    if len(text) > max_bytes:
        raise InputError(f"{_name(what)} is longer than {max_bytes:,} bytes")
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        if text.startswith("\ufeff"):
            raise ValueError("it begins with a byte order mark")
        _check_depth(text, max_depth)
        value = json.loads(
            text, object_pairs_hook=_unique_keys, parse_constant=_refuse, parse_float=_finite
        )
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise InputError(f"{_name(what)} is not valid UTF-8") from error
    except ValueError as error:
        raise InputError(f"{_name(what)} is not valid JSON: {printable(str(error))}") from error
    return value


def parse_json_object(
    text: str | bytes, what: str, *, max_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH
) -> dict[str, object]:
    """Parses JSON that holds an object; see `parse_json`."""
    return _object_only(parse_json(text, what, max_bytes=max_bytes, max_depth=max_depth), what)


def _object_only(value: object, what: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise InputError(f"{_name(what)} holds no JSON object")
    return value


def _check_depth(text: str, limit: int) -> None:
    if text.count("[") + text.count("{") <= limit:
        return
    depth = 0
    for bracket in _BRACKET.finditer(_STRING.sub("", text)):
        depth += 1 if bracket[0] in "[{" else -1
        if depth > limit:
            raise ValueError(f"it is nested deeper than {limit} levels")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {repeated[:_SHOWN]!r} is repeated")
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:_SHOWN]} is too large")
    return value


def _name(what: str | Path) -> str:
    return printable(str(what))
