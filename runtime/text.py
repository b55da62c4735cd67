"""Text that is safe to print."""

import unicodedata

# Marks, embeddings, overrides and isolates: they reorder the text around them on a terminal.
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# Control characters (C0, DEL, C1), surrogates, line and paragraph separators.
_UNPRINTABLE = frozenset(("Cc", "Cs", "Zl", "Zp"))

_MAX_MESSAGE = 2000  # characters, about 20 lines of a terminal


def message_line(text: str) -> str:
    """Returns `text` as `printable` does, the middle left out if it is longer than 2000."""
    line = printable(text)
    if len(line) <= _MAX_MESSAGE:
        return line
    half = _MAX_MESSAGE // 2
    return f"{line[:half]} ... ({len(line) - 2 * half} characters left out) ... {line[-half:]}"


def printable(text: str) -> str:
    r"""Returns `text` as one line that a terminal shows and does not obey.

    Replaces control characters (line feeds and tabs included), lone surrogates, line separators
    and bidirectional controls by their Python escapes, such as ``\x1b`` and ``\u202e``. Leaves
    backslashes and all other characters as they are, so the result is for reading, not for
    parsing.
    """
    return "".join(
        character.encode("unicode_escape").decode("ascii")
        if character in _BIDI or unicodedata.category(character) in _UNPRINTABLE
        else character
        for character in text
    )
