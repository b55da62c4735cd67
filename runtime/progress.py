"""Says what takes long before it does: activities, progress bars, and timings by phase.

Only the first process says anything: activities on stdout, bars on stderr. On a terminal a bar or a
count of seconds is redrawn in place. In a log file a bar leaves a line a tenth, at most one a
second, and an activity a dot a second.
"""

from __future__ import annotations

import contextlib
import io
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Self, TextIO

from runtime import processes
from runtime.files import write_json

if TYPE_CHECKING:
    from tqdm import tqdm

_FIRST_SIGN, _SIGNS = 1.0, 1.0  # seconds of an activity until its first sign of life, and between
_BETWEEN_LINES = 1.0  # seconds; a loop of a second leaves one line in a log, not ten
Clock = Callable[[], float]


class _SharedOutput(io.TextIOBase):
    """Stdout while its last line is unfinished: text of any thread ends or replaces that line.

    Several threads of a batch print; one of them shows a sign of life.
    """

    def __init__(self, stream: TextIO, before_text: str = ""):
        """Args: before_text: written before every line of other text."""
        self._stream, self._before_text = stream, before_text
        self._ending = ""  # of the unfinished line
        self._lock, self._in_line = threading.RLock(), False

    def write(self, text: str) -> int:
        with self._lock:
            if text and not self._in_line:
                self._stream.write(self._ending or self._before_text)
                self._ending = ""
            self._in_line = not text.endswith("\n") if text else self._in_line
            self._stream.write(text)
            return len(text)

    def sign(self, text: str, ending: str, indent: str = "") -> None:
        """Shows a part of an unfinished line, unless a thread is within a line of text."""
        with self._lock:
            if not self._in_line:
                self._stream.write(text if self._ending else indent + text)
                self._ending = ending
                self._stream.flush()

    def end_line(self) -> None:
        with self._lock:
            self._stream.write(self._ending)
            self._ending = ""
            self._stream.flush()

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Prints what is about to take long, then a sign of life each second until the block ends.

    Within another activity, below a bar and in other threads it only prints: the activity or the
    bar of the main thread shows the signs.
    """
    if not processes.is_first():
        yield
        return
    print(f"{what} ...", flush=True)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if isinstance(sys.stdout, _SharedOutput) or not in_main_thread:
        yield
        return
    output, ended = _SharedOutput(sys.stdout), threading.Event()
    signs = threading.Thread(target=_show_signs, args=(output, ended), daemon=True)
    with contextlib.redirect_stdout(output):
        signs.start()
        try:
            yield
        finally:
            ended.set()
            signs.join()


def _show_signs(output: _SharedOutput, ended: threading.Event) -> None:
    """Shows the seconds on a terminal, a dot a second elsewhere."""
    start, wait, terminal = time.monotonic(), _FIRST_SIGN, output.isatty()
    # A closed pipe or terminal is the business of the thread that works.
    with contextlib.suppress(OSError, ValueError):
        while not ended.wait(wait):
            seconds = f" {time.monotonic() - start:.0f} s"
            # The cursor returns to the left, so that the next line replaces the seconds.
            if terminal:
                output.sign(f" {seconds}\r", ending="\x1b[K")
            else:
                output.sign(".", ending=f"{seconds}\n", indent="  ")
            wait = _SIGNS
        output.end_line()


@contextlib.contextmanager
def printing_above_bar() -> Iterator[None]:
    """Lets threads print while a bar stands on the last line of the terminal."""
    shared = isinstance(sys.stdout, _SharedOutput)
    if shared or not (sys.stdout.isatty() and sys.stderr.isatty()):
        yield
        return
    # tqdm draws the bar again on the line below the text.
    with contextlib.redirect_stdout(_SharedOutput(sys.stdout, before_text="\r\x1b[K")):
        yield


class LogBar[Item]:
    """A progress bar for log files: a line whenever another tenth is done, at most one a second.

    Has what this project uses of tqdm's interface.
    """

    def __init__(
        self,
        items: Iterable[Item],
        *,
        total: int,
        what: str,
        unit: str,
        initial: int,
        stream: TextIO,
        clock: Clock = time.monotonic,
    ):
        self._items, self._total, self._what, self._unit = items, total, what, unit
        self._stream, self._clock = stream, clock
        self._done = self._initial = initial
        self._start = self._shown = clock()

    def __iter__(self) -> Iterator[Item]:
        for item in self._items:
            yield item
            self.update(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: int) -> None:
        """Counts `count` more units as done."""
        before, self._done = self._done, self._done + count
        now = self._clock()
        if self._done * 10 // self._total == before * 10 // self._total:
            return
        if self._done < self._total and now - self._shown < _BETWEEN_LINES:
            return
        self._shown, seconds = now, now - self._start
        left = seconds / (self._done - self._initial) * (self._total - self._done)
        percent = self._done * 100 // self._total
        rest = f", {left:.0f} s left" if left >= 1 else ""
        line = f"{self._what}: {self._done} of {self._total} {self._unit}s, {percent}%"
        print(f"{line}, {seconds:.1f} s{rest}", file=self._stream, flush=True)


def progress[Item](
    items: Iterable[Item] = (),
    *,
    total: int,
    what: str,
    unit: str = "step",
    initial: int = 0,
    leave: bool = True,
) -> tqdm[Item] | LogBar[Item]:
    """Shows progress on stderr, in the first process only: a bar, or in a log lines.

    Args:
        what: the label in front of the bar.
        initial: steps that were done before.
        leave: keep the full bar on the terminal at the end.
    """
    if processes.is_first() and not sys.stderr.isatty():
        return LogBar(items, total=total, what=what, unit=unit, initial=initial, stream=sys.stderr)
    from tqdm import tqdm

    hidden = not processes.is_first()
    return tqdm(
        items, total=total, desc=what, unit=unit, initial=initial, disable=hidden, leave=leave
    )


class Timings:
    """Measures phases such as start, load, compile, run and save, in seconds.

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

    def table(self) -> str:
        """One line a phase."""
        notes = {"start": "imports, checks, devices"}
        lines = []
        for name, seconds in [*self.seconds.items(), ("total", sum(self.seconds.values()))]:
            note = f"  ({notes[name]})" if name in notes else ""
            parts = self.at_once.get(name, {})
            if parts:
                note = f"  ({' and '.join(parts)} run at the same time, so they add up to more)"
            lines.append(f"  {name:<14}{seconds:>10.2f} s{note}")
            lines += [f"    {part:<12}{busy:>10.2f} s" for part, busy in parts.items()]
        return "\n".join(lines)

    def report(self, path: Path, **details: object) -> None:
        """Prints the table, and writes it with `details` to the JSON file `path`."""
        print(self.table())
        total = sum(self.seconds.values())
        rounded = {name: round(seconds, 4) for name, seconds in self.seconds.items()}
        details |= {"at_once": self.at_once} if self.at_once else {}
        write_json(path, {"seconds": {**rounded, "total": round(total, 4)}, **details})
