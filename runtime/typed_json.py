"""Read JSON files into dataclasses, with every type checked.

The files may be damaged, or written by other people and programs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from runtime.errors import InputError
from runtime.json_files import read_json_object

_MAX_BYTES = 16 << 20
_MAX_NUMBER = 2**64


def read_object(path: Path) -> dict[str, object]:
    """Reads a JSON object.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such file.
        InputError: the path is not a regular file, or its content is not a JSON object.
    """
    try:
        return read_json_object(path, max_bytes=_MAX_BYTES)
    except InputError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            raise error.__cause__ from None
        raise


def from_json[Kind](kind: type[Kind], value: object) -> Kind:
    """Makes a dataclass of a JSON object.

    Raises:
        ValueError: a field is missing, unknown or of another type, or a number is too large.
    """
    assert dataclasses.is_dataclass(kind)
    if not isinstance(value, Mapping):
        raise ValueError(f"{_shown(value)} is not an object")
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = value.keys() - fields.keys()
    if unknown:
        raise ValueError(f"unknown field {_shown(min(map(str, unknown)))}")
    made = {}
    for name, field in fields.items():
        if name in value:
            made[name] = _checked(name, value[name], hints[name])
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"no field {name}")
    return kind(**made)


def _checked(name: str, value: Any, expected: Any) -> Any:
    """Returns a field's value, of the expected type."""
    if get_origin(expected) in (Union, types.UnionType) and isinstance(value, Mapping):
        kinds = [one for one in get_args(expected) if dataclasses.is_dataclass(one)]
        expected = kinds[0] if kinds else expected
    if dataclasses.is_dataclass(expected) and isinstance(expected, type):
        try:
            return from_json(expected, value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if not _fits(value, expected):
        shown = getattr(expected, "__name__", None) or str(expected)
        raise ValueError(f"{name} is {_shown(value)}, not {shown}")
    return value


def _fits(value: Any, expected: Any) -> bool:
    origin = get_origin(expected)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in get_args(expected))
    if origin is Literal:
        return isinstance(value, str) and value in get_args(expected)
    if origin is dict:
        _, kind = get_args(expected)
        return isinstance(value, dict) and all(_fits(one, kind) for one in value.values())
    if origin is list:
        (kind,) = get_args(expected)
        return isinstance(value, list) and all(_fits(one, kind) for one in value)
    if expected is Any:
        return True
    if expected in (int, float):
        if type(value) is not int and (type(value) is not float or expected is int):
            return False
        return abs(value) <= _MAX_NUMBER and math.isfinite(value)
    return type(value) is expected or (value is None and expected is type(None))


def _shown(value: object) -> str:
    return json.dumps(value)[:80]
