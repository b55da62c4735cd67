"""Bodies of requests to make a video: JSON or a form, every field checked by name and type."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from jobs.jobfile import TYPES, check_type
from runtime.errors import InputError
from runtime.json_files import parse_json_object
from stages.condition import AUTO
from web.errors import ApiError, bad_field

# Two prompts of 20,000 characters, each escaped as twelve.
MAX_JSON_BYTES = 512 << 10
MAX_UPLOAD_BYTES = 16 << 20
MAX_FORM_BYTES = MAX_UPLOAD_BYTES + MAX_JSON_BYTES
_BODY_SECONDS = 30.0
_MAX_FIELDS = 40
_MAX_LOGIN_BYTES = 4096
_JSON_DEPTH = 4

# Fields of OpenAI's API, and after them this project's, by the names of the command line.
_OWN = ("prompt", "size", "seconds", "model", "input_reference", "lora")
SETTINGS = (
    *("negative_prompt", "num_frames", "fps", "num_inference_steps", "guidance_scale", "seed"),
    *("use_dynamic_cfg", "scheduler", "speed", "image_fit"),
)
FIELDS = (*_OWN, *SETTINGS)
_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", re.ASCII)
_SECONDS = re.compile(r"[0-9]{1,4}(\.[0-9]{1,3})?", re.ASCII)
_INTEGER = re.compile(r"-?[0-9]{1,20}", re.ASCII)
_NUMBER = re.compile(r"-?[0-9]{1,10}(\.[0-9]{1,10})?", re.ASCII)


@dataclasses.dataclass(frozen=True)
class VideoBody:
    """A request for a video, its fields of the right types; nothing is checked with the model.

    Attributes:
        settings: by the names of a job file's line.
        seconds: the wanted length.
        reference: an uploaded image, as bytes of its file.
    """

    settings: dict[str, Any]
    model: str | None = None
    seconds: float | None = None
    reference: bytes | None = None
    lora: str | None = None


async def read_video_body(request: Request) -> VideoBody:
    """Reads and checks the body of a request to make a video.

    Raises:
        ApiError: a field is unknown, given twice, or of another type; or the body is too large,
            comes too slowly, or is neither JSON nor a form.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            if kind == "application/json":
                fields = _from_json(await _read(request, MAX_JSON_BYTES))
            elif kind == "multipart/form-data":
                fields = await _from_form(request)
            else:
                raise ApiError(
                    415, "unsupported_media_type",
                    "send application/json or multipart/form-data",
                )  # fmt: skip
    except TimeoutError:
        raise ApiError(
            408, "request_timeout", f"the body did not arrive within {_BODY_SECONDS:g} s"
        ) from None
    except ClientDisconnect:
        raise ApiError(400, "disconnected", "the client left before the end of the body") from None
    return _checked(fields)


async def read_key_form(request: Request) -> str:
    """Reads the key from the form of the page that asks for it; "" if there is none."""
    body = await _read(request, _MAX_LOGIN_BYTES)
    try:
        keys = parse_qs(body.decode("ascii"), max_num_fields=2).get("key", [])
    except ValueError:
        return ""
    return keys[0] if len(keys) == 1 else ""


async def _read(request: Request, limit: int) -> bytes:
    """Reads a body of at most `limit` bytes, whatever the header says of its length."""
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limit:
        raise _too_large(limit)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        parts.append(part)
    return b"".join(parts)


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413, "too_large", f"the body is larger than {limit:,} bytes", None, {"Connection": "close"}
    )


def _from_json(body: bytes) -> dict[str, Any]:
    try:
        return parse_json_object(body, "the body", max_depth=_JSON_DEPTH)
    except InputError as error:
        raise ApiError(400, "invalid_json", str(error)) from error


async def _from_form(request: Request) -> dict[str, Any]:
    """Reads a form; the value of a file is its bytes."""
    body = await _read(request, MAX_FORM_BYTES)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    # The parts lie in memory: the whole body does, too.
    whole = Request(request.scope, receive)
    try:
        form = await whole.form(max_files=1, max_fields=_MAX_FIELDS, max_part_size=MAX_JSON_BYTES)
    except HTTPException as error:
        raise ApiError(400, "invalid_form", error.detail) from error
    except (ValueError, KeyError) as error:  # of the parser, for headers that it does not know
        raise ApiError(400, "invalid_form", "the form cannot be read") from error
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        if name in fields:
            raise bad_field(_shown(name), "is given twice")
        if isinstance(value, UploadFile):
            if name in FIELDS and name != "input_reference":
                raise bad_field(name, "is a file")
            fields[name] = await value.read()
        else:
            fields[name] = _from_text(name, value)
    return fields


def _from_text(name: str, text: str) -> Any:
    """The value of a form's field; the text itself if it is not of the field's type."""
    kind = TYPES.get(name, str)
    if kind is int and _INTEGER.fullmatch(text):
        return int(text)
    if kind is float and _NUMBER.fullmatch(text):
        return float(text)
    if kind is bool and text in ("true", "false"):
        return text == "true"
    return text


def _checked(fields: Mapping[str, Any]) -> VideoBody:
    for name in fields:
        if name not in FIELDS:
            raise ApiError(
                400, "unknown_parameter",
                f"unknown field {_shown(name)}; known: {', '.join(FIELDS)}", _shown(name),
            )  # fmt: skip
    given = {name: value for name, value in fields.items() if value is not None}
    if "prompt" not in given:
        raise ApiError(400, "missing_parameter", "prompt: it is missing", "prompt")
    settings = {}
    for name in ("prompt", *SETTINGS):
        if name in given:
            try:
                check_type(name, given[name], TYPES[name])
            except ValueError as error:
                raise ApiError(400, "invalid_value", str(error), name) from error
            settings[name] = given[name]
    if "size" in given:
        settings |= _size(given["size"])
    reference = given.get("input_reference")
    if reference is not None and not isinstance(reference, bytes):
        raise bad_field("input_reference", "send an image as a file of a multipart form")
    seconds = _seconds(given["seconds"]) if "seconds" in given else None
    if seconds is not None and "num_frames" in settings:
        raise bad_field("seconds", "num_frames says the length already")
    return VideoBody(settings, _text(given, "model"), seconds, reference, _text(given, "lora"))


def _size(value: Any) -> dict[str, int | str]:
    """OpenAI's "WIDTHxHEIGHT", or "auto" for a size that fits the image."""
    if value == AUTO:
        return {"size": AUTO}
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if not match:
        raise bad_field("size", 'is not "WIDTHxHEIGHT", such as "1360x768"')
    return {"width": int(match[1]), "height": int(match[2])}


def _seconds(value: Any) -> float:
    text = str(value) if isinstance(value, str | int | float) else ""
    if not _SECONDS.fullmatch(text) or isinstance(value, bool) or not float(text):
        raise bad_field("seconds", 'is not a positive number, such as "5"')
    return float(text)


def _text(given: Mapping[str, Any], name: str) -> str | None:
    value = given.get(name)
    if value is not None and not isinstance(value, str):
        raise bad_field(name, "is not a string")
    return value


def _shown(name: str) -> str:
    return repr(name[:80])
