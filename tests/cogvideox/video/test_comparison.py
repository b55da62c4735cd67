"""Reading of videos in every format, and comparison of two."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from cogvideox.video import comparison
from cogvideox.video.comparison import Pictures, compare_videos
from cogvideox.video.frames import inspect_video, read_frames
from cogvideox.video.metrics import mean_squared_error, psnr, to_float
from cogvideox.video.pixels import to_uint8
from cogvideox.video.writing import open_video_writer

FRAMES, HEIGHT, WIDTH, FPS = 9, 48, 80, 16
OUTPUTS = ("out.mp4", "out.gif", "out.webp", "out.npy", "frames")


def moving_square(frames=FRAMES, height=HEIGHT, width=WIDTH):
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    video = np.empty((frames, height, width, 3), np.float32)
    video[..., 0], video[..., 1], video[..., 2] = x / width, y / height, 0.4
    for f in range(frames):
        video[f, 8:24, 4 * f : 4 * f + 16] = 0.9
    return video


def write(path, video, fps=FPS):
    quality = 10 if path.suffix in (".mp4", ".webp") else None
    with open_video_writer(path, fps=fps, num_frames=len(video), quality=quality) as writer:
        writer.write(video)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same video in every format."""
    folder = tmp_path_factory.mktemp("videos")
    for name in OUTPUTS:
        write(folder / name, moving_square())
    np.save(folder / "bytes.npy", to_uint8(moving_square()))
    return folder


@pytest.mark.parametrize("name", [*OUTPUTS, "bytes.npy"])
def test_every_format_is_read_as_it_was_written(folder, name):
    video = inspect_video(folder / name)
    assert (video.num_frames, video.height, video.width) == (FRAMES, HEIGHT, WIDTH)
    stored = name.endswith((".mp4", ".gif", ".webp"))
    assert video.fps == (pytest.approx(FPS, rel=0.03) if stored else None)
    frames = list(read_frames(video))
    assert len(frames) == FRAMES and frames[0].shape == (HEIGHT, WIDTH, 3)
    exact = {"out.npy": moving_square()}.get(name, to_uint8(moving_square()))
    if name in ("out.npy", "bytes.npy", "frames"):
        assert (np.stack(frames) == exact).all()
    else:  # the worst is GIF's palette
        error = mean_squared_error(to_float(np.stack(frames)), moving_square())
        assert psnr(error) > 28


@pytest.mark.parametrize("name", OUTPUTS)
def test_equal_videos_are_identical(folder, name):
    video = inspect_video(folder / name)
    scores = compare_videos(video, video)
    assert scores.identical
    assert scores.psnr.mean == scores.psnr_of_all_pixels == np.inf
    assert scores.ssim.mean == 1
    assert scores.vmaf is not None and scores.vmaf.mean > 90


@pytest.mark.parametrize("name", OUTPUTS[:3])
def test_formats_are_comparable_with_each_other(folder, name):
    scores = compare_videos(inspect_video(folder / "out.npy"), inspect_video(folder / name))
    assert not scores.identical and scores.psnr.mean > 28
    compare_videos(inspect_video(folder / "out.mp4"), inspect_video(folder / name))


def test_figures_worst_frame_and_pictures(folder, tmp_path):
    changed = moving_square()
    changed[3, 30:40, 10:30] = 0.0  # a black patch in one frame
    changed[5] = np.clip(changed[5] + 0.01, 0, 1)
    a = inspect_video(folder / "out.npy")
    b = inspect_video(write(tmp_path / "b.npy", changed))
    pictures = Pictures(tmp_path / "both.webp", tmp_path / "worst.png", amplify=4)
    scores = compare_videos(a, b, lpips=lambda a, b: float(np.abs(a - b).mean()), pictures=pictures)
    errors = [mean_squared_error(x, y) for x, y in zip(moving_square(), changed, strict=True)]
    assert scores.psnr.frames == pytest.approx([psnr(error) for error in errors])
    assert scores.psnr.mean == np.inf and not scores.identical  # most frames are equal
    assert scores.psnr_of_all_pixels == pytest.approx(psnr(sum(errors) / FRAMES))
    assert scores.psnr.worst_frame == scores.ssim.worst_frame == 3
    assert scores.lpips is not None and scores.lpips.worst_frame == 3
    assert scores.lpips.frames[0] == 0
    # The pictures show A, B and four times their difference.
    difference = np.clip(4 * np.abs(moving_square()[3] - changed[3]), 0, 1)
    expected = to_uint8(np.concatenate([moving_square()[3], changed[3], difference], axis=1))
    with Image.open(tmp_path / "worst.png") as picture:
        assert (np.asarray(picture) == expected).all()
    both = inspect_video(tmp_path / "both.webp")
    assert (both.num_frames, both.height, both.width) == (FRAMES, HEIGHT, 3 * WIDTH)
    third = list(read_frames(both))[3]
    assert psnr(mean_squared_error(third / 255, expected / 255)) > 28


def test_vmaf_that_cannot_be_measured_is_none_and_said(folder, tmp_path, monkeypatch):
    small = inspect_video(write(tmp_path / "small.npy", moving_square(3, 16, 16)))
    scores = compare_videos(small, small)
    assert scores.vmaf is None and "17x17" in scores.notes[0]
    monkeypatch.setattr(comparison, "has_vmaf", lambda: False)
    video = inspect_video(folder / "out.npy")
    scores = compare_videos(video, video)
    assert scores.vmaf is None and "no libvmaf" in scores.notes[0]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"num_frames": 8}, "9 frames, .* 8"),
        ({"width": 82}, "48x80, .* 48x82"),
        ({"fps": 8.0}, "16 frames a second, .* 8"),
    ],
)
def test_differing_videos_are_refused(folder, change, what):
    video = inspect_video(folder / "out.mp4")
    with pytest.raises(ValueError, match=what):
        compare_videos(video, dataclasses.replace(video, **change))


def test_pictures_that_cannot_be_written_are_refused(folder, tmp_path):
    odd = inspect_video(write(tmp_path / "odd.npy", moving_square(3, 33, 47)))
    for pictures, what in (
        (Pictures(side_by_side=tmp_path / "x.mp4"), "even height"),
        (Pictures(side_by_side=tmp_path / "x.npy"), "use .mp4"),
        (Pictures(side_by_side=tmp_path / "odd.npy" / "x.gif"), "--side_by_side .* not a folder"),
        (Pictures(difference=tmp_path / "x.jpg"), r"\.png"),
    ):
        with pytest.raises(ValueError, match=what):
            compare_videos(odd, odd, pictures=pictures)


def damaged(folder, tmp_path):
    """Damaged videos: path and what the message says."""
    mp4 = (folder / "out.mp4").read_bytes()
    contents = {
        "truncated.mp4": mp4[: len(mp4) // 2],
        "empty.mp4": b"",
        "text.mp4": b"no video",
        "empty.gif": b"",
        "half.webp": (folder / "out.webp").read_bytes()[:200],
        "half.npy": (folder / "out.npy").read_bytes()[:5000],
        "text.npy": b"no array",
        "text.txt": b"no video",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        yield tmp_path / name
    for name, array in {
        "image.npy": np.zeros((4, 4, 3), np.float32),
        "integer.npy": np.zeros((2, 32, 32, 3), np.int16),
        "none.npy": np.zeros((0, 32, 32, 3), np.uint8),
        "pickle.npy": np.array([None]),
    }.items():
        np.save(tmp_path / name, array)
        yield tmp_path / name
    (tmp_path / "no_frames").mkdir()
    yield tmp_path / "no_frames"
    yield tmp_path / "missing.mp4"
    for name, change in (("gap", 2), ("sizes", 3)):
        write(tmp_path / name, moving_square())
        if name == "gap":
            (tmp_path / name / f"frame_{change:05}.png").unlink()
        else:
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"frame_{change:05}.png")
        yield tmp_path / name


def test_damaged_videos_are_refused_before_they_are_decoded(folder, tmp_path):
    for path in damaged(folder, tmp_path):
        with pytest.raises(ValueError) as refusal:
            inspect_video(path)
        assert str(tmp_path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_damage_inside_leaves_no_pictures(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.random((60, 48, 80, 3), np.float32)  # does not compress: frames of equal length
    good = inspect_video(write(tmp_path / "good.npy", noise))
    mp4 = bytearray(write(tmp_path / "bits.mp4", noise).read_bytes())
    mp4[-4000:] = bytes(4000)  # in the last frames
    (tmp_path / "bits.mp4").write_bytes(mp4)
    png = write(tmp_path / "png", noise) / "frame_00006.png"
    png.write_bytes(png.read_bytes()[:-60])
    noise[4, 0, 0] = np.nan
    np.save(tmp_path / "nan.npy", noise)
    before = sorted(tmp_path.iterdir())
    for name in ("nan.npy", "png", "bits.mp4"):
        b = inspect_video(tmp_path / name)  # finds nothing wrong
        pictures = Pictures(tmp_path / "x.mp4", tmp_path / "x.png")
        with pytest.raises(ValueError, match=name):
            compare_videos(good, b, pictures=pictures)
    assert sorted(tmp_path.iterdir()) == before
