"""Progress bars, and timings by phase."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from runtime import processes
from runtime.files import write_json

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tqdm import tqdm

Item = TypeVar("Item")


def progress(
    items: "Iterable[Item]" = (),
    *,
    total: int,
    what: str,
    unit: str = "step",
    initial: int = 0,
) -> "tqdm[Item]":
    """Shows a progress bar on stderr, in the first process only.

    Args:
        what: the label in front of the bar.
        initial: steps that were done before.
    """
    from tqdm import tqdm

    hidden = not processes.is_first()
    return tqdm(items, total=total, desc=what, unit=unit, initial=initial, disable=hidden)


class Timings:
    """Measures phases such as load, compile, run and save, in seconds.

    Attributes:
        seconds: by phase.
        at_once: by phase, the seconds of parts that ran at the same time.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.at_once: dict[str, dict[str, float]] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the duration of the block to phase `name`."""
        start = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def report(self, path: Path, **details: object) -> None:
        """Prints a table, and writes it with `details` to the JSON file `path`."""
        total = sum(self.seconds.values())
        for name, seconds in [*self.seconds.items(), ("total", total)]:
            print(f"  {name:<14}{seconds:>10.2f} s")
            for part, busy in self.at_once.get(name, {}).items():
                print(f"    {part:<12}{busy:>10.2f} s, at the same time")
        rounded = {name: round(seconds, 4) for name, seconds in self.seconds.items()}
        details |= {"at_once": self.at_once} if self.at_once else {}
        write_json(path, {"seconds": {**rounded, "total": round(total, 4)}, **details})
