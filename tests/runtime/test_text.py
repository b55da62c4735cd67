"""`printable` removes everything that controls a terminal."""

import pytest

from runtime.text import printable


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A red kite, ein Drachen, 凧 🪁", "A red kite, ein Drachen, 凧 🪁"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("C1 \x9b31m \x85", r"C1 \x9b31m \x85"),
        ("a\nb\tc\rd\x7f\0", r"a\nb\tc\rd\x7f\x00"),
        ("abc\u202edcb\u2066x\u2069\u200f\u061c", r"abc\u202edcb\u2066x\u2069\u200f\u061c"),
        ("line\u2028paragraph\u2029", r"line\u2028paragraph\u2029"),
        ("\ud800 half", r"\ud800 half"),
        ("joined 👩\u200d🚀 and نمی\u200cخواهم", "joined 👩\u200d🚀 and نمی\u200cخواهم"),
        (r"a \x1b b", r"a \x1b b"),
        ("", ""),
    ],
)
def test_printable(text, expected):
    assert printable(text) == expected
    printable(text).encode()
