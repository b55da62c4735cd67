"""Job files: one prompt per line, or one JSON object of settings per line.

Reading finds every problem of a file at once. It imports neither torch nor JAX.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from runtime.errors import InputError
from runtime.files import open_regular
from stages.condition import AUTO
from stages.encode import check_prompts

_MAX_FILE_BYTES = 64 << 20
_MAX_LINE_BYTES = 256 << 10
_MAX_SEEDS = 10_000
# The suffixes of JSON lines; every other file holds prompts.
_JSON_SUFFIXES = (".jsonl", ".ndjson")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_SIZE = re.compile(r"(\d{1,6})x(\d{1,6})", re.ASCII)
_SEEDS = re.compile(r"(\d{1,20})-(\d{1,20})", re.ASCII)
# A comment is the whole line, or begins with "#" between spaces: "take #2" is part of a prompt.
_COMMENT = re.compile(r"^#.*|\s+#(?:\s.*)?$")
_SHORT = {"frames": "num_frames", "steps": "num_inference_steps", "guidance": "guidance_scale"}
# The settings that a line may have, and their types in JSON.
TYPES: dict[str, type] = {
    **{"prompt": str, "negative_prompt": str, "max_sequence_length": int},
    **{"height": int, "width": int, "num_frames": int, "fps": int, "allow_unsupported": bool},
    **{"num_inference_steps": int, "guidance_scale": float, "use_dynamic_cfg": bool},
    **{"scheduler": str, "seed": int, "quality": int, "no_metadata": bool},
    **{"speed": str, "step_mask": str, "mask_steps": int, "guidance_until": float},
    **{"sparse_attention": str, "dense_steps": int, "dense_layers": int},
    **{"attention_precision": str},
    **{"image": str, "video": str, "image_fit": str, "size": str, "strength": float},
    **{"encode_on": str, "encoder": str},
}
_TYPE_NAMES = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
_KEYS = sorted([*TYPES, *_SHORT, "lora", "name", "seeds"])


Seeds = str | Sequence[int]
JsonSettings = Mapping[str, object]  # settings of a line by their full names


@dataclasses.dataclass(frozen=True)
class LineSettings:
    """The checked settings of one video, by the names of the command line.

    None takes the model's value.
    """

    prompt: str
    negative_prompt: str
    max_sequence_length: int | None
    height: int | None
    width: int | None
    num_frames: int | None
    fps: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    use_dynamic_cfg: bool
    scheduler: str | None
    seed: int
    allow_unsupported: bool
    dtype: str
    decoder: str
    quality: int | None
    no_metadata: bool
    speed: str
    step_mask: str | None
    mask_steps: int | None
    guidance_until: float | None
    sparse_attention: str | None
    dense_steps: int | None
    dense_layers: int | None
    attention_precision: str | None
    lora: Sequence[str] | None
    image: Path | None
    video: Path | None
    image_fit: str
    size: str | None
    encode_on: str | None
    encoder: str
    strength: float | None


# Checks the values of a line and fills in defaults; raises ValueError.
Parse = Callable[[JsonSettings], LineSettings]


@dataclasses.dataclass(frozen=True)
class Line:
    """One video of a job file.

    Attributes:
        number: of the line, from 1.
    """

    number: int
    name: str | None
    settings: LineSettings


def read_job_file(
    path: Path, parse: Parse, seeds: Seeds | None = None, inputs_dir: Path | None = None
) -> tuple[list[Line], list[tuple[int, str]]]:
    """Reads and checks every line of a job file.

    Args:
        path: JSON lines if it ends in .jsonl or .ndjson, else one prompt per line.
        parse: checks the values of a line.
        seeds: of lines that name none.
        inputs_dir: folder that images and videos must lie in; None takes that of the job file, to
            which their paths are relative.

    Returns:
        The videos in order, and the problems, each with its line number.

    Raises:
        InputError: the file is empty, too large, or cannot be read.
    """
    content, read = _read(path), _from_line if path.suffix.lower() in _JSON_SUFFIXES else _from_text
    lines, problems = [], []
    for number, raw in enumerate(content.splitlines(), 1):
        try:
            settings = read(_decode(raw))
            if settings is not None:
                _place_inputs(settings, path.parent, inputs_dir or path.parent)
                lines += _expand(number, settings, parse, seeds)
        except ValueError as error:
            problems.append((number, str(error)))
    if not lines and not problems:
        raise InputError(f"{path} holds no job")
    return lines, problems


def read_prompts(
    prompts: Sequence[str], parse: Parse, seeds: Seeds | None
) -> tuple[list[Line], list[tuple[int, str]]]:
    """Makes the videos of prompts from the command line, as `read_job_file` does of lines."""
    lines, problems = [], []
    for number, prompt in enumerate(prompts, 1):
        try:
            lines += _expand(number, {"prompt": prompt}, parse, seeds)
        except ValueError as error:
            problems.append((number, str(error)))
    return lines, problems


def read_settings(path: Path, known: Collection[str]) -> dict[str, Any]:
    """Reads the settings of a run from a JSON object with the keys of a job file's line and more.

    Args:
        known: names of the settings that it may have.

    Raises:
        InputError: the file cannot be read, or a key or a type is wrong.
    """
    try:
        settings = _from_json(_decode(_read(path)), sorted({*known, *_SHORT, "size"}))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    for key, value in settings.items():
        if not isinstance(value, str | int | float) and key not in ("seeds", "lora"):
            raise InputError(f"{path}: {key} is {json.dumps(value)[:80]}, not a single value")
    return settings


def _place_inputs(settings: dict[str, Any], base: Path, allowed: Path) -> None:
    """Makes the paths of a line's image or video absolute.

    Raises:
        ValueError: one lies outside of `allowed`, symbolic links followed.
    """
    for name in ("image", "video"):
        if name in settings:
            if "\0" in settings[name]:
                raise ValueError(f"{name} contains a NUL character")
            target = (base / settings[name]).resolve()
            if not target.is_relative_to(allowed.resolve()):
                raise ValueError(
                    f"{name} {settings[name][:80]!r} lies outside of {allowed}; see --inputs_dir"
                )
            settings[name] = str(target)


def _read(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if len(content) > _MAX_FILE_BYTES:
        raise InputError(f"{path} has more than {_MAX_FILE_BYTES >> 20} MiB")
    return content.removeprefix(b"\xef\xbb\xbf")


def _decode(raw: bytes) -> str:
    if len(raw) > _MAX_LINE_BYTES:
        raise ValueError(f"{len(raw) >> 10} KiB long; at most {_MAX_LINE_BYTES >> 10}")
    try:
        return raw.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid UTF-8 at byte {error.start + 1}") from error


def _from_text(text: str) -> dict[str, Any] | None:
    if text.startswith("{"):
        raise ValueError(f"looks like JSON; name the file *{_JSON_SUFFIXES[0]} for JSON lines")
    text = _COMMENT.sub("", text)
    return {"prompt": text} if text else None


def _from_line(text: str) -> dict[str, Any] | None:
    """Reads the settings of a line; None for an empty line."""
    if not text:
        return None
    settings = _from_json(text, _KEYS)
    if "prompt" not in settings:
        raise ValueError("no prompt")
    return settings


def _from_json(text: str, known: Sequence[str]) -> dict[str, Any]:
    """Reads settings by their full names and checks the types of those in TYPES."""
    try:
        settings = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON at column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(settings, dict):
        raise ValueError('not a JSON object such as {"prompt": "A red kite"}')
    for key in settings:
        if key not in known:
            raise ValueError(f"unknown key {key[:80]!r}; known: {', '.join(sorted(known))}")
    for short, full in _SHORT.items():
        if short in settings:
            if full in settings:
                raise ValueError(f"{short} and {full} are the same setting")
            settings[full] = settings.pop(short)
    if settings.get("size", AUTO) != AUTO:
        match = isinstance(settings["size"], str) and _SIZE.fullmatch(settings.pop("size"))
        if not match:
            raise ValueError('size is neither "HEIGHTxWIDTH" nor "auto"')
        if {"height", "width"} & settings.keys():
            raise ValueError("size says height and width already")
        settings |= {"height": int(match[1]), "width": int(match[2])}
    for key in settings.keys() & TYPES.keys():
        check_type(key, settings[key], TYPES[key])
    if "lora" in settings:
        given = settings["lora"]
        settings["lora"] = files = given if isinstance(given, list) else [given]
        if not all(isinstance(file, str) for file in files):
            raise ValueError('lora is neither "FILE=WEIGHT" nor a list of such')
    return settings


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"key {key[:80]!r} is given twice")
    return dict(pairs)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def check_type(key: str, value: Any, expected: type) -> None:
    """Checks the type of a JSON value.

    Raises:
        ValueError: it is another one, or the number is too large.
    """
    fits = type(value) is expected or (expected is float and type(value) is int)
    # Larger numbers overflow machine integers; 1e999 reads as infinity.
    if fits and type(value) in (int, float):
        fits = math.isfinite(value) and abs(value) <= 2**64
    if not fits:
        shown = json.dumps(value, ensure_ascii=False)[:80]
        raise ValueError(f"{key} is {shown}, not {_TYPE_NAMES[expected]}")


def _expand(
    number: int, settings: dict[str, Any], parse: Parse, default_seeds: Seeds | None
) -> list[Line]:
    """Makes the videos of one line: one, or one per seed."""
    default = None if "seed" in settings else default_seeds
    name, seeds = settings.pop("name", None), settings.pop("seeds", default)
    if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ValueError(
            f"name {json.dumps(name, ensure_ascii=False)[:80]} cannot be used; take up to 64 "
            "letters, digits, - and _, the first one a letter or digit"
        )
    if seeds is None:
        return [Line(number, name, _parse(settings, parse))]
    if "seed" in settings:
        raise ValueError("seed and seeds are both given")
    return [
        Line(number, name and f"{name}-seed{seed}", _parse(settings | {"seed": seed}, parse))
        for seed in read_seeds(seeds)
    ]


def read_seeds(seeds: object) -> list[int] | range:
    """The seeds of a list, or of a range such as "1-4".

    Raises:
        ValueError: it is neither, or there are more than 10,000.
    """
    if isinstance(seeds, str) and (match := _SEEDS.fullmatch(seeds)):
        first, last = int(match[1]), int(match[2])
        if first > last or last - first >= _MAX_SEEDS:
            raise ValueError(f"seeds {seeds!r}: not a range of at most {_MAX_SEEDS} seeds")
        return range(first, last + 1)
    if not isinstance(seeds, list) or not seeds or len(seeds) > _MAX_SEEDS:
        raise ValueError('seeds is neither a list of integers nor a range such as "1-4"')
    for seed in seeds:
        check_type("seeds", seed, int)
    return seeds


def _parse(settings: JsonSettings, parse: Parse) -> LineSettings:
    parsed = parse(settings)
    check_prompts([parsed.prompt], parsed.negative_prompt)
    return parsed
