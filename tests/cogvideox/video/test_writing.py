"""Video files: what is written is what was handed over, or nothing is."""

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from cogvideox.video.formats import wants_float
from cogvideox.video.pixels import to_uint8
from cogvideox.video.reading import read_comment
from cogvideox.video.writing import open_video_writer
from runtime.errors import RunError

FPS = 16
ALL_OUTPUTS = ("out.mp4", "out.gif", "out.webp", "out.npy", "frames")


def smooth_video(frames=9, height=48, width=80):
    """float32 [frames, height, width, 3]: a gradient with a bright square that moves across."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    video = np.empty((frames, height, width, 3), np.float32)
    video[..., 0], video[..., 1], video[..., 2] = x / width, y / height, 0.4
    for f in range(frames):
        video[f, 8:24, 4 * f : 4 * f + 16] = 0.9
    return video


def write(path, video, batches=(0, 3, 5, 9), **options):
    """Writes `video` [F, ...] in uneven batches, as a decoder would hand them over."""
    with open_video_writer(path, fps=FPS, num_frames=len(video), **options) as writer:
        for start, end in zip(batches, (*batches[1:], len(video)), strict=True):
            batch = video[start:end]
            writer.write(batch if wants_float(path) else to_uint8(batch))


def ffmpeg(*arguments):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=False)


def read_mp4(path, height, width):
    done = ffmpeg("-v", "error", "-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    assert done.returncode == 0, done.stderr
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3)


def read_animation(path):
    """Frames [F, height, width, 3] and milliseconds of each, by a reader that is not ffmpeg."""
    frames, milliseconds = [], []
    with Image.open(path) as image:
        assert image.n_frames == 1 or image.info["loop"] == 0  # for ever
        for index in range(image.n_frames):
            image.seek(index)
            frames.append(np.asarray(image.convert("RGB")))
            milliseconds.append(image.info["duration"])
    return np.stack(frames), milliseconds


def read(path, height=48, width=80):
    if path.suffix == ".mp4":
        return read_mp4(path, height, width)
    if path.suffix in (".gif", ".webp"):
        return read_animation(path)[0]
    if path.suffix == ".npy":
        return to_uint8(np.load(path))
    return np.stack([np.asarray(Image.open(file)) for file in sorted(path.iterdir())])


def psnr(a, b):
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return 10 * np.log10(255**2 / error)


@pytest.mark.parametrize("value", [-0.01, 1.01, np.nan, np.inf])
def test_values_outside_the_range_are_refused(tmp_path, value):
    video = smooth_video()
    video[4, 3, 2, 1] = value
    with pytest.raises(ValueError, match="within 0..1"):
        to_uint8(video)
    with pytest.raises(ValueError, match="within 0..1"):
        write(tmp_path / "out.npy", video)
    assert not list(tmp_path.iterdir())


def test_npy_is_exact(tmp_path):
    video = np.random.default_rng(0).random((9, 7, 5, 3), dtype=np.float32)
    write(tmp_path / "deep" / "er" / "out.npy", video)
    loaded = np.load(tmp_path / "deep" / "er" / "out.npy")
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, video)


def test_npy_refuses_frames_that_were_rounded(tmp_path):
    with open_video_writer(tmp_path / "a.npy", fps=FPS, num_frames=9) as writer:
        with pytest.raises(TypeError, match="float32"):
            writer.write(to_uint8(smooth_video()))
        writer.write(smooth_video())


def test_png_folder_is_exact_and_replaced_whole(tmp_path):
    folder = tmp_path / "frames"
    write(folder, smooth_video(frames=12), batches=(0, 5))
    video = smooth_video()
    write(folder, video)
    assert sorted(file.name for file in folder.iterdir())[-1] == "frame_00008.png"
    np.testing.assert_array_equal(read(folder), to_uint8(video))
    assert [entry.name for entry in tmp_path.iterdir()] == ["frames"]


def test_float_and_uint8_frames_make_the_same_file(tmp_path):
    video = smooth_video()
    write(tmp_path / "bytes.mp4", video)
    with open_video_writer(tmp_path / "floats.mp4", fps=FPS, num_frames=9) as writer:
        writer.write(video)
    assert (tmp_path / "bytes.mp4").read_bytes() == (tmp_path / "floats.mp4").read_bytes()


# Lossy formats at their default quality measure 40.5 (mp4), 32.3 (gif: 256 colours) and 36.0 dB
# (webp) on the worst frame of this picture; another frame in its place is below 20.5 dB.
@pytest.mark.parametrize(
    ("name", "least_psnr"), [("out.mp4", 39), ("out.gif", 31), ("out.webp", 34)]
)
def test_lossy_formats_keep_every_frame_in_order(tmp_path, name, least_psnr):
    video = to_uint8(smooth_video())
    write(tmp_path / name, smooth_video())
    found = read(tmp_path / name)
    assert found.shape == video.shape
    for index, frame in enumerate(found):
        assert psnr(frame, video[index]) > least_psnr
        assert psnr(frame, video[(index + 1) % len(video)]) < 22


@pytest.mark.parametrize("name", ALL_OUTPUTS)
def test_one_frame_is_a_video(tmp_path, name):
    video = smooth_video(frames=1)
    write(tmp_path / name, video, batches=(0,))
    assert read(tmp_path / name).shape == video.shape


@pytest.mark.parametrize("name", ["out.gif", "out.webp"])
def test_animations_last_as_long_as_the_video(tmp_path, name):
    # 1/16 s is 62.5 ms, which neither format can say (GIF counts 10 ms, WebP 1 ms): the frames
    # take turns, and the whole is right to the last frame's rounding.
    write(tmp_path / name, smooth_video(frames=33, height=16, width=160), batches=(0,))
    _, milliseconds = read_animation(tmp_path / name)
    assert abs(sum(milliseconds) - 33 * 1000 / FPS) <= 10
    assert max(milliseconds) - min(milliseconds) <= 10


def test_mp4_is_what_players_expect(tmp_path):
    write(tmp_path / "out.mp4", smooth_video(), quality=10)
    said = ffmpeg("-i", tmp_path / "out.mp4").stderr.decode()
    stream = next(line for line in said.splitlines() if "Video:" in line)
    assert "h264 (High)" in stream  # at lossless quality it would be High 4:4:4
    assert "yuv420p(tv, bt709, progressive)" in stream
    assert "80x48" in stream and "16 fps" in stream
    start = (tmp_path / "out.mp4").read_bytes()
    assert start.index(b"moov") < start.index(b"mdat")  # plays before it is loaded


def test_mp4_keeps_colours(tmp_path):
    # Flat colours, so only the colour conversion counts: 8-bit yuv rounds by up to 2 levels.
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [120, 60, 200]])
    video = np.repeat(colours[:, None, None, :], 32, 1).repeat(32, 2).astype(np.uint8)
    with open_video_writer(tmp_path / "c.mp4", fps=FPS, num_frames=5, quality=10) as writer:
        writer.write(video)
    found = read_mp4(tmp_path / "c.mp4", 32, 32).astype(int)
    assert np.abs(found - video).max() <= 2


def test_quality_orders_size_and_likeness(tmp_path):
    video = smooth_video() * 0.9
    video += np.random.default_rng(0).random(video.shape, dtype=np.float32) * 0.1
    for suffix in (".mp4", ".webp"):
        sizes, likeness = [], []
        for quality in (0, 5, 10):
            path = tmp_path / f"q{quality}{suffix}"
            write(path, video, quality=quality)
            sizes.append(path.stat().st_size)
            likeness.append(psnr(read(path), to_uint8(video)))
        assert sizes == sorted(sizes) and likeness == sorted(likeness)
        assert sizes[2] > 2 * sizes[0]


def test_mp4_odd_sizes_are_refused_and_even_ones_kept(tmp_path):
    with pytest.raises(ValueError, match="even height and width, got 48x81"):
        write(tmp_path / "odd.mp4", smooth_video(width=81))
    write(tmp_path / "even.mp4", smooth_video(height=50, width=82))  # not multiples of 16
    assert read_mp4(tmp_path / "even.mp4", 50, 82).shape == (9, 50, 82, 3)
    assert [entry.name for entry in tmp_path.iterdir()] == ["even.mp4"]


def test_comment_is_in_the_mp4_only_when_given(tmp_path):
    comment = '{"prompt": "a = b; #1 \\"Mädchen\\" 猫\nsecond line", "seed": 0}'
    write(tmp_path / "with.mp4", smooth_video(), comment=comment)
    write(tmp_path / "without.mp4", smooth_video())
    assert read_comment(tmp_path / "with.mp4") == comment
    assert read_comment(tmp_path / "without.mp4") is None


@pytest.mark.parametrize("name", ["pipe:1.mp4", "-y %d.webp", "100%.gif"])
def test_names_mean_nothing_to_ffmpeg(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write(Path(name), smooth_video())
    assert len(read(tmp_path / name)) == 9
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "out.npy").symlink_to(tmp_path / "real" / "video.bin")
    write(tmp_path / "out.npy", smooth_video())
    assert (tmp_path / "out.npy").is_symlink()
    np.testing.assert_array_equal(np.load(tmp_path / "real" / "video.bin"), smooth_video())


@pytest.mark.parametrize("name", ALL_OUTPUTS)
def test_an_error_leaves_the_old_video_and_nothing_else(tmp_path, name):
    path, old = tmp_path / name, smooth_video()
    write(path, old)
    before = read(path)
    with pytest.raises(KeyboardInterrupt):
        with open_video_writer(path, fps=FPS, num_frames=20) as writer:
            writer.write(1 - old)
            raise KeyboardInterrupt
    with pytest.raises(ValueError, match="only 9 of 20 frames"):
        with open_video_writer(path, fps=FPS, num_frames=20) as writer:
            writer.write(1 - old)
    with pytest.raises(ValueError, match="more than 8 frames"):
        with open_video_writer(path, fps=FPS, num_frames=8) as writer:
            writer.write(1 - old)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
    np.testing.assert_array_equal(read(path), before)


@pytest.mark.parametrize("name", ["out.mp4", "out.npy", "frames"])
def test_a_killed_run_leaves_the_old_video_and_the_next_cleans_up(tmp_path, name):
    path, old = tmp_path / name, smooth_video()
    write(path, old)
    before = read(path)
    code = f"""
import os, signal, time, numpy as np
from pathlib import Path
from cogvideox.video.writing import open_video_writer
path = Path({str(path)!r})
with open_video_writer(path, fps=16, num_frames=9) as writer:
    writer.write(np.zeros((8, 48, 80, 3), np.float32))
    while len(list(path.parent.iterdir())) < 2:  # ffmpeg makes its file in its own time
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    np.testing.assert_array_equal(read(path), before)
    assert len(list(tmp_path.iterdir())) == 2  # the old video and the hidden temporary
    mine = tmp_path / f".{name}.notes.tmp"  # a user's file whose name is near ours
    mine.touch()
    write(path, 1 - old)
    assert {entry.name for entry in tmp_path.iterdir()} == {name, mine.name}
    assert np.abs(read(path).astype(int) - to_uint8(1 - old)).mean() < 3


def test_a_living_run_keeps_its_temporary_folder(tmp_path):
    other = tmp_path / f".frames.{os.getppid()}.tmp"
    other.mkdir()
    write(tmp_path / "frames", smooth_video())
    assert other.exists()


def test_a_kill_between_the_renames_of_a_folder_is_put_right(tmp_path):
    folder = tmp_path / "frames"
    write(folder, smooth_video())
    folder.rename(tmp_path / ".frames.old")  # what such a kill leaves
    with pytest.raises(KeyboardInterrupt):
        with open_video_writer(folder, fps=FPS, num_frames=9):
            np.testing.assert_array_equal(read(folder), to_uint8(smooth_video()))
            raise KeyboardInterrupt
    np.testing.assert_array_equal(read(folder), to_uint8(smooth_video()))
    assert [entry.name for entry in tmp_path.iterdir()] == ["frames"]


def test_an_error_between_the_renames_of_a_folder_is_put_right(tmp_path, monkeypatch):
    folder, rename = tmp_path / "frames", os.rename
    write(folder, smooth_video())

    def rename_but_not_the_new_folder(source, target):
        if Path(source).suffix == ".tmp":
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_but_not_the_new_folder)
    with pytest.raises(OSError, match="no"):
        write(folder, 1 - smooth_video())
    np.testing.assert_array_equal(read(folder), to_uint8(smooth_video()))
    assert [entry.name for entry in tmp_path.iterdir()] == ["frames"]


@pytest.mark.parametrize("name", ["out.mp4", "out.npy", "frames"])
def test_a_disk_that_refuses_is_an_error_and_the_old_video_stays(tmp_path, name):
    path = tmp_path / name
    write(path, smooth_video(frames=2), batches=(0,))
    before = read(path)
    noise = np.random.default_rng(0).random((9, 128, 128, 3), dtype=np.float32)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # less than one frame of noise
    try:
        with pytest.raises(OSError):
            write(path, noise)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
    np.testing.assert_array_equal(read(path), before)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_what_the_disk_tells_ffmpeg_is_one_line(tmp_path, monkeypatch, number):
    program = tmp_path / "ffmpeg"
    program.write_text(f"#!/bin/sh\ncat >/dev/null\necho 'a\n{os.strerror(number)}' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(program))
    with pytest.raises(RunError, match=f"^cannot write .*out.mp4: {os.strerror(number)}$"):
        write(tmp_path / "out.mp4", smooth_video(frames=2))


@pytest.mark.parametrize("shape", [(48, 80, 3), (2, 48, 80, 4), (2, 3, 48, 80)])
def test_frames_of_another_shape_are_refused(tmp_path, shape):
    with pytest.raises(ValueError, match="must be"):
        with open_video_writer(tmp_path / "out.gif", fps=FPS, num_frames=2) as writer:
            writer.write(np.zeros(shape, np.uint8))


def test_frames_that_change_size_or_dtype_are_refused(tmp_path):
    with pytest.raises(ValueError, match="48x82 follow frames of 48x80"):
        with open_video_writer(tmp_path / "out.mp4", fps=FPS, num_frames=2) as writer:
            writer.write(np.zeros((1, 48, 80, 3), np.uint8))
            writer.write(np.zeros((1, 48, 82, 3), np.uint8))
    with pytest.raises(TypeError, match="float64"):
        with open_video_writer(tmp_path / "out.mp4", fps=FPS, num_frames=2) as writer:
            writer.write(np.zeros((1, 48, 80, 3), np.float64))
