"""Errors of requests, in the shape that OpenAI's clients expect."""

from __future__ import annotations

import re
from pathlib import Path

from starlette.responses import JSONResponse

_OPTION = re.compile(r"(?<![\w-])--([a-z][a-z_]*)")
_IMAGE = re.compile(r"--image\b( FILE)?")
_ALLOW = re.compile(r";? ?--allow_unsupported.*$|, or allow any with --allow_unsupported.*$")


class ApiError(Exception):
    """A request is refused.

    Attributes:
        status: HTTP's, 400 to 499; 503 while the disk is full.
        code: short and fixed, for programs.
        parameter: the field of the request that is wrong.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        parameter: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.parameter, self.headers = parameter, headers

    def response(self) -> JSONResponse:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": self.message, "type": kind, "param": self.parameter, "code": self.code}
        return JSONResponse({"error": error}, self.status, self.headers)


def bad_field(parameter: str, message: str) -> ApiError:
    """The error of a request whose field `parameter` cannot be used."""
    return ApiError(400, "invalid_value", f"{parameter}: {message}", parameter)


def from_check(error: ValueError, *folders: Path | None) -> ApiError:
    """Turns the refusal of a command line's check into one that names the request's field.

    Args:
        folders: whose paths are no client's business.
    """
    text = " ".join(str(error).split())
    for folder in filter(None, folders):
        text = text.replace(f"{folder}/", "")
    text = _IMAGE.sub("--input_reference", text)
    named = _OPTION.search(text)
    field = named[1] if named else None
    if field in ("height", "width"):
        field = "size"
    message = _ALLOW.sub("", text.removeprefix("argument "))
    message = _OPTION.sub(r"\1", message)
    return ApiError(400, "invalid_value", message, field)
