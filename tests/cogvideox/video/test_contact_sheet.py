"""Contact sheets: the right frames, every one visible, any caption drawn."""

import numpy as np
import pytest
from PIL import Image

from cogvideox.video import fonts
from cogvideox.video.contact_sheet import (
    FrameSampler,
    _caption_lines,
    _grid_columns,
    write_contact_sheet,
)


def coloured_frames(count, height, width):
    """uint8 [count, height, width, 3]: every frame one colour of its own, far from the others."""
    channels = np.stack(np.unravel_index(np.arange(count), (3, 3, 3)), -1) * 80 + 60
    return np.broadcast_to(channels[:, None, None], (count, height, width, 3)).astype(np.uint8)


def write(path, frames, caption="a prompt\nseed 0"):
    write_contact_sheet(path, frames, indices=range(len(frames)), fps=16, caption=caption)
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("num_frames", [1, 2, 9, 12, 13, 49, 81, 161])
def test_sampler_keeps_evenly_spaced_frames_with_both_ends(num_frames):
    sampler = FrameSampler(num_frames)
    assert len(sampler.indices) == len(set(sampler.indices)) == min(12, num_frames)
    assert sampler.indices[0] == 0 and sampler.indices[-1] == num_frames - 1
    if num_frames > 1:
        steps = np.diff(sampler.indices)
        assert steps.max() - steps.min() <= 1
    video = np.arange(num_frames, dtype=np.uint8)[:, None, None, None] * np.ones(
        (1, 4, 6, 3), np.uint8
    )
    for start in range(0, num_frames, 8):
        batch = video[start : start + 8].copy()
        sampler.add(batch)
        batch[:] = 255  # what was kept must not depend on the batch any more
    np.testing.assert_array_equal(sampler.frames(), video[sampler.indices])


def test_sampler_converts_floats_and_counts():
    sampler = FrameSampler(4, count=2)
    sampler.add(np.full((3, 2, 2, 3), 0.5, np.float32))
    with pytest.raises(ValueError, match="only 3 of 4"):
        sampler.frames()
    with pytest.raises(ValueError, match="5 frames were added to a video of 4"):
        sampler.add(np.zeros((2, 2, 2, 3), np.float32))
    sampler.add(np.ones((1, 2, 2, 3), np.float32))
    assert sampler.frames().dtype == np.uint8
    np.testing.assert_array_equal(sampler.frames()[:, 0, 0, 0], [128, 255])


@pytest.mark.parametrize(
    ("count", "height", "width"),
    [(12, 768, 1360), (12, 1360, 768), (9, 32, 48), (12, 96, 160), (5, 480, 720), (1, 64, 64)],
)
def test_every_frame_is_on_the_sheet_in_reading_order(tmp_path, count, height, width):
    frames = coloured_frames(count, height, width)
    sheet = write(tmp_path / "sheet.png", frames)
    assert 960 <= sheet.shape[1] <= 1600
    previous, areas = (-1, -1), set()
    for frame in frames:
        rows, columns = np.nonzero((sheet == frame[0, 0]).all(-1))
        top, left = rows.min(), columns.min()
        shown = (rows.max() - top + 1, columns.max() - left + 1)
        assert len(rows) == shown[0] * shown[1]  # nothing is drawn over it
        assert abs(shown[1] / shown[0] - width / height) < 0.02 * width / height
        assert (top, left) > previous
        previous = (top, left)
        areas.add(shown)
    assert len(areas) == 1


@pytest.mark.parametrize(
    ("count", "height", "width", "columns"),
    [(12, 768, 1360, 4), (12, 1360, 768, 6), (9, 32, 48, 3), (5, 480, 720, 3), (1, 64, 64, 1)],
)
def test_the_grid_suits_a_screen(count, height, width, columns):
    assert _grid_columns(count, width / height) == columns


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "one line",
        "\n\nlines\n\nwith gaps\n",
        "word " * 400,
        "x" * 3000,
        "Mädchen, девушка, κορίτσι, 猫在月光下弹吉他 " * 9 + "\U0001f43c مرحبا नमस्ते",
        "half a pair \udc80, a bell \x07, a zero \x00, a tab \t, a break \u2028 and a mark \u202e",
    ],
)
def test_captions_of_any_kind_are_wrapped_and_drawn(tmp_path, caption):
    sheet = write(tmp_path / "sheet.png", coloured_frames(4, 32, 48), caption)
    plain = write(tmp_path / "plain.png", coloured_frames(4, 32, 48), "")
    margins = np.concatenate([sheet[:, :20], sheet[:, -20:]], 1)
    assert (margins == sheet[0, 0]).all()  # no line runs out of the sheet
    assert (sheet.shape[0] > plain.shape[0]) == bool(caption)


def test_wrapping_loses_no_text():
    caption = "A first line that is long enough to wrap somewhere\nand " + "x" * 99 + " the rest"
    lines = _caption_lines(caption, 300)
    width = lambda line: sum(font.getlength(part) for part, font in line.runs)  # noqa: E731
    assert all(width(line) <= 300 for line in lines)
    assert "".join("".join(line.text for line in lines).split()) == "".join(caption.split())
    assert lines[0].height > lines[-1].height  # the prompt is larger


def test_characters_that_are_no_text_become_spaces():
    (line,) = _caption_lines("a\x00b\x07c\td\u202ee\udc80f", 900)
    assert line.text == "a b c d e f"


def test_the_caption_takes_a_font_that_has_its_letters():
    plain, accented = (_caption_lines(text, 900)[0].runs[0][1] for text in ("girl", "Mädchen"))
    assert plain.getname()[0] == "Aileron"  # Pillow's own, the same on every machine
    if accented.getname() == plain.getname():
        pytest.skip("this machine has no further font")
    assert bytes(accented.getmask("ä")) != bytes(accented.getmask("\uffff"))


def test_characters_of_several_fonts_share_a_line():
    """The packages of the extra "fonts" are installed, or a font of this system has them."""
    text = "A cat 猫 고양이 plays 🐼 quietly"
    found = fonts.Fonts(text)
    if found.lacking:
        pytest.skip(f"this machine has no font for {found.lacking}")
    runs = found.runs(text, 22)
    assert "".join(part for part, _ in runs) == text
    for part, font in runs:
        box = bytes(font.getmask("\uffff"))
        assert all(bytes(font.getmask(c)) != box for c in part if not c.isspace()), part


def test_missing_characters_are_named_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fonts, "_SYSTEM_FONTS", ())
    monkeypatch.setattr(fonts, "_PACKAGES", ("no_such_package",))
    write(tmp_path / "sheet.png", coloured_frames(2, 32, 48), "a cat 猫 猫\nand 🐼\ufe0f")
    said = capsys.readouterr().out
    assert said.startswith("warning: no font here has 猫🐼; boxes stand for it")
    assert said.count("\n") == 1 and ".[fonts]" in said
    write(tmp_path / "sheet.png", coloured_frames(2, 32, 48), "a cat")
    assert capsys.readouterr().out == ""


def test_sheet_is_replaced_or_left(tmp_path):
    path = tmp_path / "new" / "sheet.png"
    path.parent.mkdir()
    write(path, coloured_frames(2, 32, 48))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="2 frames and 3 frame numbers"):
        write_contact_sheet(
            path, coloured_frames(2, 32, 48), indices=[0, 1, 2], fps=16, caption="a"
        )
    with pytest.raises(ValueError, match="uint8"):
        write_contact_sheet(path, np.zeros((1, 8, 8, 3)), indices=[0], fps=16, caption="a")
    assert path.read_bytes() == before
    write(path, coloured_frames(3, 32, 48))
    assert path.read_bytes() != before
    assert [entry.name for entry in path.parent.iterdir()] == ["sheet.png"]
