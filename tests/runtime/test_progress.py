"""Progress bars and activities in logs, on terminals and in processes; the timings table."""

import io
import itertools
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from runtime import progress
from runtime.progress import LogBar, Timings

PROJECT = Path(__file__).parents[2]
RUN_SCRIPT = "from runtime.exit_codes import run_script\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def bar(total: int, initial: int = 0) -> list[str]:
    """Returns the lines of a bar over `total` steps of one second each."""
    stream, seconds = io.StringIO(), itertools.count()
    shown = LogBar(
        range(total - initial),
        **{"total": total, "what": "denoising", "unit": "step", "initial": initial},
        **{"stream": stream, "clock": lambda: next(seconds)},
    )
    assert list(shown) == list(range(total - initial))
    assert "\r" not in stream.getvalue()
    return stream.getvalue().splitlines()


def test_a_log_gets_one_line_a_tenth():
    lines = bar(900)
    assert len(lines) == 10
    assert lines[0].startswith("denoising: 90 of 900 steps, 10%")
    assert lines[-1].startswith("denoising: 900 of 900 steps, 100%")
    assert len(bar(3)) == 3
    assert [line.split()[1] for line in bar(100, initial=85)] == ["90", "100"]


def test_a_bar_counts_what_comes_in_groups():
    stream, seconds = io.StringIO(), itertools.count()
    frames = {"total": 17, "what": "decoding", "unit": "frame", "initial": 0, "stream": stream}
    with LogBar((), **frames, clock=lambda: next(seconds)) as shown:
        shown.update(9)
        shown.update(8)
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["9", "17"]


def test_a_short_loop_leaves_one_line_in_a_log():
    stream = io.StringIO()
    shown = LogBar(
        range(20), total=20, what="a", unit="step", initial=0, stream=stream, clock=lambda: 0.5
    )
    assert len(list(shown)) == 20
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["20"]


def test_stderr_decides_which_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(progress.progress(total=3, what="a"), LogBar)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert not isinstance(progress.progress(total=3, what="a"), LogBar)


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_an_activity_is_said_before_it_starts_and_shows_life(stream, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(progress, "_FIRST_SIGN", 0)
    monkeypatch.setattr(progress, "_SIGNS", 0)
    start = "compiling ...\n"
    seen = threading.Event()
    write = stream.write
    monkeypatch.setattr(stream, "write", lambda text: (write(text), "." in text and seen.set()))
    with progress.working("compiling"):
        assert stream.getvalue().startswith(start)
        assert isinstance(stream, Terminal) or seen.wait(20)
    signs = stream.getvalue().removeprefix(start)
    if isinstance(stream, Terminal):
        assert "\n" not in signs  # redrawn in place
    else:
        assert signs.startswith("  .") and signs.count("\n") == 1 and "\r" not in signs


def test_a_short_activity_is_one_line(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    with progress.working("encoding"):
        pass
    assert stream.getvalue() == "encoding ...\n"


def test_other_text_ends_the_line_of_signs(monkeypatch):
    """In a log, and on a terminal, where it replaces the seconds."""
    for stream, expected in (
        (io.StringIO(), r"working \.\.\.\n(  \.+ 0 s\n)?a line\n(  \.+ 0 s\n)?inner \.\.\.\n.*"),
        (Terminal(), r"working \.\.\.\n(  0 s\r)*(\x1b\[K)?a line\n.*inner \.\.\.\n.*"),
    ):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(progress, "_FIRST_SIGN", 0.01)
        monkeypatch.setattr(progress, "_SIGNS", 0.01)
        with progress.working("working"):
            threading.Event().wait(0.1)
            print("a line")
            with progress.working("inner"):
                threading.Event().wait(0.1)
        text = stream.getvalue()
        assert re.fullmatch(expected, text, re.DOTALL), text
        assert sys.stdout is stream


def test_text_of_another_thread_erases_the_bar(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.printing_above_bar():
        stream.write("denoising:  40%|####")
        thread = threading.Thread(target=print, args=("a line",))
        thread.start()
        thread.join()
    assert stream.getvalue() == "denoising:  40%|####\r\x1b[Ka line\n"
    assert sys.stdout is stream


def test_the_table_explains_parts_that_ran_at_once():
    timings = Timings()
    timings.add("start", 5.0)
    timings.add("run and save", 3.0)
    timings.at_once["run and save"] = {"decoding": 2.0, "saving": 2.5}
    table = timings.table()
    assert "imports" in table
    assert "decoding and saving run at the same time" in table


def run(code: str, stdout, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        **{"cwd": PROJECT, "stdout": stdout, "stderr": subprocess.PIPE, "text": True},
        env={**os.environ, "PYTHONPATH": str(PROJECT), **environment},
    )


def test_a_closed_pipe_ends_in_one_line():
    """`| head -1` closes the pipe like this."""
    reader, writer = os.pipe()
    os.close(reader)
    done = run(f"{RUN_SCRIPT}run_script(lambda: print('a line'))", writer)
    os.close(writer)
    assert done.returncode == 1
    assert done.stderr == "failed: the reader of the output closed it\n"


@pytest.mark.parametrize(
    "environment",
    [{"LANG": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
)
def test_any_locale_prints_any_prompt(environment):
    done = run(
        f"{RUN_SCRIPT}run_script(lambda: print('\\u732b \\U0001f43c'))",
        subprocess.PIPE,
        **environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("猫 🐼", "\\u732b \\U0001f43c")
