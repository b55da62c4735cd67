"""Values that a thread computes ahead are the same, in order, and so are its errors."""

import itertools
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from cogvideox.denoising.noise import drawn_ahead


def counted(seen: list[int], stop: int | None = None) -> Iterator[np.ndarray]:
    for i in itertools.count() if stop is None else range(stop):
        seen.append(i)
        yield np.full(2, i)


@pytest.mark.parametrize("length", [0, 1, 3, 20])
@pytest.mark.parametrize("count", [1, 2, 8])
def test_values_come_in_order_and_end(length, count):
    found = [int(value[0]) for value in drawn_ahead(counted([], length), count)]
    assert found == list(range(length))


def test_no_more_than_asked_for_are_drawn_ahead_and_the_thread_ends():
    seen: list[int] = []
    before = threading.active_count()
    values = drawn_ahead(counted(seen), 3)
    next(values)
    deadline = time.monotonic() + 10
    while len(seen) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert seen == [0, 1, 2, 3]
    values.close()
    assert threading.active_count() == before and seen == [0, 1, 2, 3]


def test_an_error_comes_where_its_value_would():
    def failing() -> Iterator[np.ndarray]:
        yield np.zeros(1)
        raise RuntimeError("the process that draws noise ended")

    values = drawn_ahead(failing())
    next(values)
    with pytest.raises(RuntimeError, match="that draws noise ended"):
        next(values)
