"""Contact sheet: evenly spaced frames of a video in a grid over a caption.

`FrameSampler` keeps the few frames that the sheet needs while the video is decoded;
`write_contact_sheet` draws them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from cogvideox.video.fonts import Fonts
from runtime.text import printable

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image, ImageFont

DEFAULT_COUNT = 12
# The sheet shows frames at twice their size within these bounds, which fit a laptop screen and keep
# the caption readable.
_MIN_WIDTH, _MAX_WIDTH = 960, 1600
_GRID_ASPECT = 2.2  # preferred width over height of the grid, without labels and caption
_MARGIN, _GAP = 24, 8
# Variation selectors choose between forms of the character before; fonts draw them as boxes.
_SELECTORS = re.compile("[\ufe00-\ufe0f]")
_MAX_NAMED = 40  # most missing characters that the warning names
_LABEL_SIZE, _TITLE_SIZE, _TEXT_SIZE = 15, 22, 17
_BACKGROUND, _TITLE_COLOR, _TEXT_COLOR = (20, 21, 24), (240, 240, 240), (168, 172, 180)


class FrameSampler:
    """Keeps evenly spaced frames of a video that arrives in batches, first and last included.

    Attributes:
        indices: frame numbers kept, ascending; min(count, num_frames) of them.
    """

    def __init__(self, num_frames: int, count: int = DEFAULT_COUNT) -> None:
        if num_frames < 1 or count < 1:
            raise ValueError(f"need at least one frame, got {num_frames} and {count} to keep")
        count = min(count, num_frames)
        self.indices = [round(i * (num_frames - 1) / max(1, count - 1)) for i in range(count)]
        self._num_frames = num_frames
        self._kept: list[np.ndarray] = []
        self._seen = 0

    def add(self, frames: np.ndarray) -> None:
        """Takes the next frames [f, height, width, 3], uint8 or float32 in 0..1; keeps some."""
        from cogvideox.video.pixels import to_uint8

        end = self._seen + len(frames)
        if end > self._num_frames:
            raise ValueError(f"{end} frames were added to a video of {self._num_frames}")
        for index in self.indices:
            if self._seen <= index < end:
                frame = frames[index - self._seen]
                # Copy, because a view would keep the whole batch in memory.
                self._kept.append(frame.copy() if frame.dtype.name == "uint8" else to_uint8(frame))
        self._seen = end

    def frames(self) -> np.ndarray:
        """Returns the kept frames, uint8 [len(indices), height, width, 3], after the last batch."""
        import numpy as np

        if self._seen != self._num_frames:
            raise ValueError(f"only {self._seen} of {self._num_frames} frames were added")
        return np.stack(self._kept)


def write_contact_sheet(
    path: Path,
    frames: np.ndarray,
    *,
    indices: Sequence[int],
    fps: int,
    caption: str,
    start: Path | None = None,
) -> None:
    """Draws frames in a grid over a caption and writes a PNG to `path`.

    Args:
        path: the output, any suffix; a temporary file, which the caller renames.
        frames: uint8 [n, height, width, 3], in order.
        indices: frame number of each; the label shows it and its time, index / fps seconds.
        fps: frames a second.
        caption: any text, wrapped to the sheet. The first line, meant for the prompt, is drawn
            larger. Characters that no installed font has are drawn as boxes, with a warning.
        start: picture that the video starts from, drawn before the frames.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype.name != "uint8":
        raise ValueError(f"frames must be uint8 [n, height, width, 3], got {frames.shape}")
    if len(frames) == 0 or len(indices) != len(frames):
        raise ValueError(f"{len(frames)} frames and {len(indices)} frame numbers")
    labels = [f"frame {index}   {index / fps:.2f} s" for index in indices]
    if start is not None:
        import numpy as np
        from PIL import Image

        with Image.open(start) as picture:
            resized = picture.convert("RGB").resize(frames.shape[2:0:-1], Image.Resampling.BICUBIC)
        frames, labels = np.concatenate([np.asarray(resized)[None], frames]), ["input", *labels]
    sheet = _draw_sheet(frames, labels, caption)
    sheet.save(path, format="PNG")


def _draw_sheet(frames: np.ndarray, labels: list[str], caption: str) -> Image.Image:
    from PIL import Image, ImageDraw, ImageFont

    count, height, width = frames.shape[:3]
    columns = _grid_columns(count, width / height)
    rows = math.ceil(count / columns)
    gaps = 2 * _MARGIN + (columns - 1) * _GAP
    sheet_width = min(max(2 * width * columns + gaps, _MIN_WIDTH), _MAX_WIDTH)
    thumb_width = (sheet_width - gaps) // columns
    thumb_height = max(1, round(thumb_width * height / width))
    label_font = ImageFont.load_default(_LABEL_SIZE)
    label_height = _line_height(_LABEL_SIZE)
    cell_height = thumb_height + label_height + _GAP

    caption_top = _MARGIN + rows * cell_height + _GAP
    caption_lines = _caption_lines(caption, sheet_width - 2 * _MARGIN)
    caption_height = sum(line.height for line in caption_lines)
    sheet_height = caption_top + caption_height + _MARGIN
    sheet = Image.new("RGB", (sheet_width, sheet_height), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)

    def shrink(frame: np.ndarray) -> Image.Image:
        size = (thumb_width, thumb_height)
        return Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)

    with ThreadPoolExecutor() as pool:
        thumbs = list(pool.map(shrink, frames))
    for number, (thumb, label) in enumerate(zip(thumbs, labels, strict=True)):
        row, column = divmod(number, columns)
        left = _MARGIN + column * (thumb_width + _GAP)
        top = _MARGIN + row * cell_height
        sheet.paste(thumb, (left, top))
        draw.text((left, top + thumb_height + 3), label, _TEXT_COLOR, label_font)
    top = caption_top
    for line in caption_lines:
        left, baseline = float(_MARGIN), top + line.ascent
        for part, font in line.runs:
            draw.text((left, baseline), part, line.color, font, anchor="ls")
            left += font.getlength(part)
        top += line.height
    return sheet


def _grid_columns(count: int, frame_aspect: float) -> int:
    """Returns the number of columns that is near `_GRID_ASPECT` and leaves few cells empty."""

    def cost(columns: int) -> float:
        rows = math.ceil(count / columns)
        empty = (columns * rows - count) / columns
        return abs(math.log(columns * frame_aspect / rows / _GRID_ASPECT)) + empty

    return min(range(1, count + 1), key=cost)


@dataclasses.dataclass(frozen=True)
class _Line:
    runs: list[tuple[str, ImageFont.FreeTypeFont]]
    ascent: int  # of the font that has most of the text
    color: tuple[int, int, int]
    height: int

    @property
    def text(self) -> str:
        return "".join(part for part, _ in self.runs)


def _caption_lines(caption: str, width: int) -> list[_Line]:
    """Wraps the caption: the first line large, then a gap, then the rest small."""
    paragraphs = _SELECTORS.sub("", caption).splitlines()
    fonts = Fonts("".join(paragraphs))
    if fonts.lacking:
        named = printable("".join(sorted(fonts.lacking))[:_MAX_NAMED])
        print(
            f"warning: no font here has {named}; boxes stand for it on the contact sheet "
            "(pip install '.[fonts]' installs Noto)"
        )
    lines = []
    for number, paragraph in enumerate(paragraphs):
        size, color = (_TITLE_SIZE, _TITLE_COLOR) if number == 0 else (_TEXT_SIZE, _TEXT_COLOR)
        ascent, _ = fonts.base(size).getmetrics()
        lines += [
            _Line(fonts.runs(text, size), ascent, color, _line_height(size))
            for text in _wrap(paragraph, functools.partial(fonts.length, size=size), width)
        ]
        if number == 0:
            lines[-1] = dataclasses.replace(lines[-1], height=lines[-1].height + _GAP)
    return lines


def _wrap(paragraph: str, length: Callable[[str], float], width: int) -> list[str]:
    """Breaks at spaces; inside a word only if the word alone is wider than the line."""
    # Replace control and direction characters, and lone surrogates of a non-UTF-8 command line.
    drawable = "".join(c if c.isprintable() else " " for c in paragraph)
    lines = [""]
    for word in drawable.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if length(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for character in word:  # a script without spaces makes one long word
            if lines[-1] and length(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines


def _line_height(font_size: float) -> int:
    return math.ceil(1.4 * font_size)
