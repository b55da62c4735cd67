"""Uploaded images, checked by decoding them in a process with limits."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from runtime.files import atomic_path
from runtime.text import printable
from web.errors import ApiError, bad_field

_SCRIPT = Path(__file__).parent / "image_process.py"
_SECONDS = 15
_MAX_PNG_BYTES = 96 << 20  # RGBA of the most pixels


class Uploads:
    """The images that clients sent, each by its checksum, in a hidden folder beside the jobs'."""

    def __init__(self, output_dir: Path):
        self._folder = output_dir.absolute() / ".uploads"

    def keep(self, data: bytes) -> Path:
        """Writes an image of `decode_image`, unless just that is there."""
        path = self._folder / f"{hashlib.sha256(data).hexdigest()}.png"
        if not path.exists():
            with atomic_path(path) as temporary:
                temporary.write_bytes(data)
        return path

    def delete(self, path: Path) -> None:
        """Deletes an upload; other files stay."""
        if path.parent == self._folder:
            path.unlink(missing_ok=True)


def decode_image(data: bytes) -> bytes:
    """Decodes an image that a client sent, and returns it as a PNG of this project's own making.

    Raises:
        ApiError: it is no PNG, JPEG or WebP, is damaged or too large, or takes too long.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(_SCRIPT)],
            input=data,
            capture_output=True,
            timeout=_SECONDS,
            env={},
        )
    except subprocess.TimeoutExpired:
        raise bad_field("input_reference", "the image takes too long to decode") from None
    if done.returncode != 0 or len(done.stdout) > _MAX_PNG_BYTES:
        said = printable(done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2])
        reason = said[:200] or "it cannot be decoded"
        raise ApiError(
            400, "invalid_image", f"input_reference: no PNG, JPEG or WebP image: {reason}",
            "input_reference",
        )  # fmt: skip
    return done.stdout
