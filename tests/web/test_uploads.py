"""Uploads are decoded in a process with limits; what comes out is an image of our own making."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from jobs.records import read_batch
from tests.tiny_models import save_tiny_model
from tests.web.serving import Server
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


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server of an image-to-video model, without a worker."""
    model = tmp_path_factory.mktemp("model") / "tiny"
    save_tiny_model(model, sample_height=4, sample_width=6, sample_frames=17, image_to_video=True)
    folder = tmp_path_factory.mktemp("served") / "videos"
    with Server(model, folder, "--no_worker", "--max_queue=2") as server:
        yield server


def form(data: bytes, **fields: str) -> tuple[bytes, str]:
    """A form with an image, and its content type."""
    parts = [
        f'--BB\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in {"prompt": "a red kite", **fields}.items()
    ]
    head = b'--BB\r\nContent-Disposition: form-data; name="input_reference"; filename="a.png"'
    head += b"\r\n\r\n"
    return b"".join([*parts, head, data, b"\r\n--BB--\r\n"]), "multipart/form-data; boundary=BB"


def send(server: Server, data: bytes, **fields: str):
    body, kind = form(data, **fields)
    return server.ask("POST", "/v1/videos", body, content_type=kind)


def test_videos_start_from_an_upload_that_lives_as_long_as_they(server):
    uploads = server.folder / ".uploads"
    made = [send(server, encoded("PNG"), seed=seed) for seed in "12"]
    assert [answer.status for answer in made] == [200, 200], made[0].body
    (file,) = uploads.iterdir()
    assert {state.job.input.path for state in read_batch(server.folder)} == {str(file)}
    other = encoded("PNG", Image.fromarray(PIXELS[:, :4]))
    assert send(server, other, seed="3").status == 429
    assert list(uploads.iterdir()) == [file]
    for answer in made:
        assert file.exists()
        assert server.ask("DELETE", f"/v1/videos/{answer.json['id']}").status == 200
    assert not file.exists()


def test_an_image_to_video_model_needs_an_image(server):
    answer = server.ask("POST", "/v1/videos", {"prompt": "a red kite"})
    assert (answer.status, answer.json["error"]["param"]) == (400, "input_reference")
    answer = send(server, encoded("PNG"), size="7x7")
    assert (answer.status, answer.json["error"]["param"]) == (400, "size")
    assert str(server.folder) not in answer.body.decode()
    assert not list((server.folder / ".uploads").iterdir())
    assert server.ask("GET", "/").body.count(b'type="file"') == 1
