"""Uploads are decoded in a process with limits; what comes out is an image of our own making."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from web.errors import ApiError
from web.uploads import decode_image

PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def encoded(kind: str, image: Image.Image | None = None, **options) -> bytes:
    file = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_pixels_stay(kind):
    made = decode_image(encoded(kind, lossless=True))
    with Image.open(io.BytesIO(made), formats=["PNG"]) as image:
        np.testing.assert_array_equal(np.asarray(image), PIXELS)


def test_a_turned_photo_is_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(io.BytesIO(decode_image(encoded("JPEG", exif=exif)))) as image:
        assert image.size == (4, 6) and not image.getexif()


def bomb() -> bytes:
    """A small PNG that says it has 60,000 x 60,000 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1 << 20))
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
    return start + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data",
    [b"", b"x" * 1000, b"GIF89a", encoded("PNG")[:-30], encoded("BMP"), bomb(), b"%!PS-Adobe-3.0"],
    ids=["empty", "no image", "gif", "cut", "bmp", "bomb", "postscript"],
)
def test_others_are_refused(data):
    with pytest.raises(ApiError) as error:
        decode_image(data)
    assert (error.value.status, error.value.parameter) == (400, "input_reference")
    assert "/" not in error.value.message.replace("input_reference", "")
