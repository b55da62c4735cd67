"""Fonts for text in any script: one for most of it, others for the characters that it lacks."""

from __future__ import annotations

import importlib.util
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

# Found by Pillow in the folders of the system's fonts. Earlier ones are preferred.
_SYSTEM_FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf"),
    *("NotoSansCJK-Regular.ttc", "DroidSansFallbackFull.ttf", "wqy-microhei.ttc", "msyh.ttc"),
    *("NotoEmoji-Regular.ttf", "Symbola.ttf"),
)
# Noto, in packages that hold nothing else (the extra "fonts").
_PACKAGES = ("manimgx_fonts_cjk", "manimgx_fonts")
_REGULAR = 400  # weight of variable fonts, which begin at their thinnest
_CHECKED_SIZE = 17
_NO_CHARACTER = "\uffff"  # in no font, so it is drawn as the font's missing-character box


class Fonts:
    """The fonts of one text.

    Attributes:
        lacking: characters that no font here has; they are drawn as boxes.
    """

    def __init__(self, text: str):
        """Looks for fonts until every character of `text` is found.

        Pillow's own font is preferred but has little beyond ASCII, not even umlauts.
        """
        from PIL import ImageFont

        default = ImageFont.load_default(_CHECKED_SIZE)
        if not isinstance(default, ImageFont.FreeTypeFont):
            raise RuntimeError("contact sheets need a Pillow with FreeType; this one has none")
        characters = {c for c in text if c.isprintable() and not c.isspace()}
        found = [(default, characters & _covered(default, characters))]
        self.lacking = characters - found[0][1]
        for font in _more_fonts():
            if not self.lacking:
                break
            found.append((font, _covered(font, characters)))
            self.lacking -= found[-1][1]
        self._base, known = max(found, key=lambda one: len(one[1]))
        self._others = {c: font for font, has in reversed(found) for c in has - known}
        self._sized: dict[tuple[int, int], FreeTypeFont] = {}

    def base(self, size: int) -> FreeTypeFont:
        """The font that has most of the text."""
        return self._at(self._base, size)

    def runs(self, text: str, size: int) -> list[tuple[str, FreeTypeFont]]:
        """Splits a line into parts that one font draws."""
        runs: list[tuple[str, FreeTypeFont]] = []
        for character in text:
            font = self._at(self._others.get(character, self._base), size)
            # Spaces and combining marks stay with what precedes them.
            joined = character.isspace() or unicodedata.category(character).startswith("M")
            if runs and (runs[-1][1] is font or joined):
                runs[-1] = runs[-1][0] + character, runs[-1][1]
            else:
                runs.append((character, font))
        return runs

    def length(self, text: str, size: int) -> float:
        """The width of a line in pixels."""
        return sum(font.getlength(part) for part, font in self.runs(text, size))

    def _at(self, font: FreeTypeFont, size: int) -> FreeTypeFont:
        key = id(font), size
        if key not in self._sized:
            self._sized[key] = _regular(font.font_variant(size=size))
        return self._sized[key]


def _more_fonts() -> Iterator[FreeTypeFont]:
    from PIL import ImageFont

    for name in _SYSTEM_FONTS:
        try:
            yield _regular(ImageFont.truetype(name, _CHECKED_SIZE))
        except OSError:  # the font is not installed
            continue
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        folders = (spec.submodule_search_locations or ()) if spec else ()
        for path in sorted(path for folder in folders for path in Path(folder).glob("*.tt[fc]")):
            if "Italic" not in path.name:
                yield _regular(ImageFont.truetype(str(path), _CHECKED_SIZE))


def _regular(font: FreeTypeFont) -> FreeTypeFont:
    """The font, a variable one at its regular weight."""
    try:
        axes = font.get_variation_axes()
    except OSError:  # not a variable font
        return font
    regular = [
        _REGULAR if axis.get("name") == b"Weight" else axis.get("default") or 0 for axis in axes
    ]
    font.set_variation_by_axes(list(map(float, regular)))
    return font


def _covered(font: FreeTypeFont, characters: set[str]) -> set[str]:
    """Those of the characters that a font has."""
    from PIL import Image, ImageDraw

    def drawn(character: str) -> bytes:
        image = Image.new("L", (2 * _CHECKED_SIZE, 2 * _CHECKED_SIZE))
        ImageDraw.Draw(image).text((0, 0), character, 255, font)
        return image.tobytes()

    box = drawn(_NO_CHARACTER)
    return {character for character in characters if drawn(character) != box}
