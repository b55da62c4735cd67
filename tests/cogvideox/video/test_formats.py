"""Checks of the output path and the settings of a video."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cogvideox.video.formats import check_output_path
from cogvideox.video.writing import open_video_writer

FPS = 16
ALL_OUTPUTS = ("out.mp4", "out.gif", "out.webp", "out.npy", "frames")


def test_importing_and_checking_load_nothing_heavy():
    code = """
import sys
from pathlib import Path
from cogvideox.video.formats import check_output_path
check_output_path(Path("out.mp4"), fps=16, quality=5)
print(sorted({"numpy", "PIL", "imageio", "imageio_ffmpeg", "torch", "jax"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", [*ALL_OUTPUTS, "OUT.MP4", "not/yet/there/out.gif", "a.b.webp"])
def test_good_paths_pass_and_nothing_is_made(tmp_path, name):
    check_output_path(tmp_path / name)
    check_output_path(tmp_path / name, fps=8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.avi", r"unknown suffix '.avi'; use one of .mp4, .gif, .webp, .npy, or no suffix"),
        ("run.v2", "unknown suffix '.v2'"),
        (".mp4", "no name before"),
        ("..", "not a name"),
        ("file.txt/out.mp4", "file.txt' is not a folder"),
        ("file.txt/deeper/out.mp4", "file.txt' is not a folder"),
        ("folder.mp4", "a .mp4 output must be a file"),
        ("plain", "exists and is not a folder"),
        ("mixed", "such as 'notes.txt'"),
        ("nested", "such as 'frame_00001.png'"),
        ("x" * 300 + ".mp4", "too long by 64 bytes"),
    ],
)
def test_bad_paths_are_refused_in_one_line(tmp_path, name, message):
    (tmp_path / "file.txt").touch()
    (tmp_path / "plain").touch()
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "frame_00000.png").touch()
    (tmp_path / "mixed" / "notes.txt").touch()
    (tmp_path / "nested" / "frame_00001.png").mkdir(parents=True)
    with pytest.raises(ValueError, match=message) as caught:
        check_output_path(tmp_path / name)
    assert str(caught.value).startswith("--output_video ")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message):  # the writer checks for itself
        with open_video_writer(tmp_path / name, fps=FPS, num_frames=1):
            pass


def test_an_unwritable_parent_is_refused(tmp_path, monkeypatch):
    # Whoever runs as root may write everywhere, so the answer of the system is replaced.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(ValueError, match="not writable"):
        check_output_path(tmp_path / "new" / "out.mp4")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("a.mp4", {"fps": 0}, "--fps 0"),
        ("a.gif", {"fps": 51}, "at most 50"),
        ("a.mp4", {"quality": 11}, "from 0 to 10"),
        ("a.webp", {"quality": -1}, "from 0 to 10"),
        ("a.npy", {"quality": 5}, "only .mp4 and .webp"),
        ("frames", {"quality": 5}, "only .mp4 and .webp"),
    ],
)
def test_settings_that_the_format_cannot_have_are_refused(tmp_path, name, settings, message):
    with pytest.raises(ValueError, match=message):
        check_output_path(tmp_path / name, **settings)
