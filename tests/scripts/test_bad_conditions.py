"""Bad images, videos and options of them end with exit code 2 and one line, before weights load."""

import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import generate
import stage1_text_encoder as stage1
import stage2_transformer as stage2
from cogvideox.video import inputs
from tests.parity.test_conditions import picture
from tests.scripts.test_bad_input import refusal
from tests.tiny_models import save_tiny_model

PROMPT = ["--prompt", "A red cat"]
SIZE = ["--height", 32, "--width", 48, "--allow_unsupported"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_model(folder / "text")
    save_tiny_model(folder / "image", image_to_video=True)
    sizes = {"sample_height": 4, "sample_width": 6, "sample_frames": 9}
    save_tiny_model(folder / "learned", "1.0-rope", image_to_video=True, **sizes)
    for name, changes in (("CogVideoX-Fun-V1.1", {}), ("channels", {"in_channels": 17})):
        shutil.copytree(folder / "image", folder / name)
        config = folder / name / "transformer/config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    index = folder / "control/model_index.json"
    shutil.copytree(folder / "image", index.parent)
    kind = {"_class_name": "CogVideoXFunControlPipeline"}
    index.write_text(json.dumps(json.loads(index.read_text()) | kind))
    return folder


@pytest.fixture(autouse=True)
def no_weights_are_read(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("weights were read before the input was checked")

    monkeypatch.setattr("cogvideox.model.folder.StoredTensor.mapped", refuse)
    monkeypatch.setattr("cogvideox.model.folder.StoredTensor.read", refuse)
    monkeypatch.setattr("cogvideox.text.encoder.load_text_encoder", refuse)


def bomb(path: Path, side: int) -> None:
    """A PNG that says it has side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1 << 20))
    content = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def truncated(path: Path) -> None:
    picture(path, "RGB", (64, 64))
    path.write_bytes(path.read_bytes()[:900])


def frames(path: Path, count: int, height: int = 32, width: int = 48) -> None:
    np.save(path, np.zeros((count, height, width, 3), np.uint8))


IMAGES: dict[str, tuple[str, Callable[[Path], object] | None, str]] = {
    "no such file": ("a.png", None, "there is no such file"),
    "a folder": ("a.png", Path.mkdir, "is a folder"),
    "empty": ("a.png", Path.touch, "is damaged"),
    "text": ("a.png", lambda path: path.write_text("hello"), "is damaged"),
    "truncated JPEG": ("a.jpg", truncated, "is damaged"),
    "bomb of 20,000 pixels a side": ("a.png", lambda path: bomb(path, 20_000), "too large"),
    "bomb that Pillow only warns of": ("a.png", lambda path: bomb(path, 11_000), "at most"),
    "16-bit": (
        "a.png",
        lambda path: Image.fromarray(np.zeros((9, 9), np.uint16)).save(path),
        "mode I;16",
    ),
    "a video": ("a.npy", lambda path: frames(path, 9), "not one of PNG"),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_images(kind, models, tmp_path, capsys, recwarn):
    name, make, said = IMAGES[kind]
    if make is not None:
        make(tmp_path / name)
    where = ["--model_id", models / "image", "--output_dir", tmp_path / "out", *SIZE]
    assert said in refusal(capsys, stage1, *PROMPT, *where, "--image", tmp_path / name)
    assert not [warning for warning in recwarn if "bomb" in str(warning.message).lower()]


def test_a_pipe_and_a_large_file(models, tmp_path, capsys, monkeypatch):
    import os

    os.mkfifo(tmp_path / "pipe.png")
    where = ["--model_id", models / "image", "--output_dir", tmp_path / "out", *SIZE]
    said = refusal(capsys, stage1, *PROMPT, *where, "--image", tmp_path / "pipe.png")
    assert "named pipe" in said
    monkeypatch.setattr(inputs, "_MOST_BYTES", 1000)
    picture(tmp_path / "a.png", "RGB", (64, 64))
    assert "larger" in refusal(capsys, stage1, *PROMPT, *where, "--image", tmp_path / "a.png")


@pytest.mark.parametrize(
    ("count", "arguments", "said"),
    [
        (3, [], "3 frames, 1 latent frames"),
        (9, [], "nearest: 5 to 8 frames"),
        (16, ["--height", 40], "nearest: 32"),
        (200, [], "2 to 42; nearest: 165 to 168 frames"),
        (None, [], "no such file"),
    ],
)
def test_videos(count, arguments, said, models, tmp_path, capsys):
    if count is not None:
        frames(tmp_path / "a.npy", count)
    where = ["--model_id", models / "text", "--output_dir", tmp_path / "out", *SIZE[:-1]]
    where += [] if count == 200 or count == 9 else ["--allow_unsupported"]
    where = where[:4] + where[8:] if count in (200, 9) else where
    given = [*where, *arguments, "--video", tmp_path / "a.npy"]
    assert said in refusal(capsys, stage1, *PROMPT, *given)


def test_damaged_videos(models, tmp_path, capsys, monkeypatch):
    where = ["--model_id", models / "text", "--output_dir", tmp_path / "out", *SIZE]
    (tmp_path / "a.mp4").write_bytes(b"\0" * 99)
    (tmp_path / "folder").mkdir()
    np.save(tmp_path / "nan.npy", np.full((8, 32, 48, 3), np.nan, np.float32))
    frames(tmp_path / "large.npy", 8, 10_000, 1)
    monkeypatch.setattr(inputs, "_MOST_PIXELS", 9_999)
    for name, said in (
        ("a.mp4", "damaged or not a video"),
        ("folder", "holds no PNG frames"),
        ("nan.npy", "within 0..1"),
        ("large.npy", "10,000 pixels"),
    ):
        assert said in refusal(capsys, stage1, *PROMPT, *where, "--video", tmp_path / name)


def test_options_and_models(models, tmp_path, capsys):
    image = picture(tmp_path / "a.png", "RGB", (30, 20))
    frames(tmp_path / "a.npy", 8)
    given, video = ["--image", image], ["--video", tmp_path / "a.npy"]
    for model, arguments, said in (
        ("image", [], "give stage 1 an image"),
        ("image", video, "--video is for text-to-video models"),
        ("text", given, "--image needs an image-to-video model"),
        ("text", ["--size", "auto"], "--size is for --image or --video"),
        ("text", ["--height", 32], "are for --image or --video"),
        ("text", ["--encode_on", "cpu"], "--encode_on is for"),
        ("image", [*given, *video], "both given"),
        ("image", [*given, "--size", "auto", "--height", 32], "says height and width"),
        ("image", [*given, "--height", 32, "--width", 40], "nearest: 32"),
        ("image", [*given, "--height", 32, "--width", 48], "is not a size of"),
        ("learned", [*given, "--height", 64, "--width", 48], "is not a size of"),
        ("learned", [*given, *SIZE[2:], "--height", 64], "--height 64: this model's learned"),
        ("CogVideoX-Fun-V1.1", given, "CogVideoX-Fun models"),
        ("control", given, "CogVideoX-Fun models"),
        ("channels", given, "17 input channels"),
    ):
        where = ["--model_id", models / model, "--output_dir", tmp_path / "out"]
        assert said in refusal(capsys, stage1, *PROMPT, *where, *arguments), (model, arguments)
    for model, arguments, said in (
        ("text", ["--strength", 0.5], "is for a video"),
        ("text", [*video, *SIZE, "--strength", 1.5], "--strength"),
        ("text", [*video, *SIZE, "--strength", 0.1, "--steps", 4], "take at least 0.25"),
        ("text", [*video, *SIZE, "--num_frames", 9], "--num_frames 9: the video was encoded for 8"),
        ("image", [*given, *SIZE, "--strength", 0.5], "is for --video, not for --image"),
        ("learned", [*given, "--num_frames", 13, "--allow_unsupported"], "take 9"),
        ("learned", [*given, "--max_sequence_length", 8, "--allow_unsupported"], "made for 16"),
    ):
        where = ["--model_id", models / model, "--output_dir", tmp_path / "out"]
        assert said in refusal(capsys, generate, *PROMPT, *where, *arguments), (model, arguments)
    assert not (tmp_path / "out").exists()


def test_stage_2_refuses_other_sizes_and_damaged_conditions(models, tmp_path, capsys, monkeypatch):
    monkeypatch.undo()  # stage 1 reads weights
    out = tmp_path / "out"
    image = picture(tmp_path / "a.png", "RGB", (30, 20))
    arguments = [*PROMPT, "--model_id", models / "image", "--output_dir", out, "--image", image]
    stage1.run(stage1.parse_arguments(list(map(str, [*arguments, *SIZE]))))
    again = ["--input_dir", out, "--allow_unsupported"]
    assert "encoded for 32" in refusal(capsys, stage2, *again, "--height", 64)
    file = out / "stage1_conditions.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert "run stage1_text_encoder.py again" in refusal(capsys, stage2, *again)
    file.unlink()
    assert "run stage1_text_encoder.py first" in refusal(capsys, stage2, *again)
