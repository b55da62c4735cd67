"""The list of deliberate mistakes fits the tree; `make mutants` runs it."""

import re
from pathlib import Path

from tests.mutants import MUTANTS, ROOT, texts


def test_every_old_text_occurs_once_and_every_test_exists():
    assert not texts(MUTANTS)


def test_names_are_unique_and_mistakes_change_something():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert all(mutant.old != mutant.new for mutant in MUTANTS)


def test_named_tests_are_defined():
    for test in {test for mutant in MUTANTS for test in mutant.tests if "::" in test}:
        file, *names = re.sub(r"\[.*", "", test).split("::")
        source = Path(ROOT, file).read_text("utf-8")
        for name in names:
            assert re.search(rf"^ *(def|class) {name}\b", source, re.MULTILINE), test
