"""Runs a command under a terminal and into a pipe, and measures how long it says nothing.

    python -m tests.fuzz.silence -- make demo
    python -m tests.fuzz.silence --limit 2 --only pipe -- python batch.py jobs.jsonl --output_dir b

Prints JSON: the longest silences with the words around them, and the lines that do not help: bars
redrawn into a log, terminal sequences in a pipe, warnings of libraries, empty and repeated lines.
Exit code 1 if a silence exceeds the limit, a line does not help, or the command fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Output that came at once."""

    seconds: float  # since the start of the command
    text: str


@dataclasses.dataclass(frozen=True)
class Silence:
    """Time without output."""

    seconds: float
    at: float  # since the start of the command
    after: str  # the last words before it
    before: str  # the first words that ended it


@dataclasses.dataclass(frozen=True)
class Recording:
    """The output of a command with its times."""

    chunks: list[Chunk]
    seconds: float
    code: int

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    def silences(self) -> list[Silence]:
        """Returns the silences from the start, between chunks and to the end, longest first."""
        found = []
        last, said = 0.0, "(start)"
        for chunk in [*self.chunks, Chunk(self.seconds, "(end)")]:
            quiet = round(chunk.seconds - last, 2)
            found.append(Silence(quiet, round(last, 2), said, _words(chunk.text)[:80]))
            last, said = chunk.seconds, _words(chunk.text)[-80:] or said
        return sorted(found, key=lambda silence: silence.seconds, reverse=True)


def _words(text: str) -> str:
    return " ".join(text.split())


def record(command: Sequence[str], terminal: bool, cwd: Path | None = None) -> Recording:
    """Runs a command, its stdout and stderr together in one pseudo-terminal or pipe."""
    reader, writer = pty.openpty() if terminal else os.pipe()
    if terminal:
        termios.tcsetwinsize(writer, (24, 100))  # tqdm draws nothing on a terminal of width 0
    start = time.monotonic()
    environment = os.environ | ({"TERM": "xterm", "COLUMNS": "100"} if terminal else {})
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer, cwd=cwd, env=environment
    )
    os.close(writer)
    chunks: list[Chunk] = []
    while True:
        select.select([reader], [], [])
        try:
            data = os.read(reader, 1 << 16)
        except OSError:  # a terminal whose other end is closed
            data = b""
        if not data:
            break
        chunks.append(Chunk(time.monotonic() - start, data.decode(errors="replace")))
    os.close(reader)
    code = process.wait()
    return Recording(chunks, time.monotonic() - start, code)


# Lines of libraries that are useless to a user of this project.
_NOISE = {
    "a warning of Python": re.compile(r"\w*Warning: |warnings\.warn"),
    "a bar of transformers": re.compile(r"Loading (weights|checkpoint)|Writing model shards"),
    "a box of setuptools": re.compile(r"\*{20}|!!$"),
    "a log line of a library": re.compile(r"^[WIEF]\d{4} |^(WARNING|INFO):|^20\d\d-\d\d-\d\d "),
}  # fmt: skip


def unhelpful(recording: Recording, terminal: bool) -> list[str]:
    """Returns the lines that do not help, with their counts."""
    found: Counter[str] = Counter()
    text = recording.text.replace("\r\n", "\n")
    lines = text.split("\n")
    for line in lines:
        if not terminal and "\r" in line:
            shown = _words(line.rpartition("\r")[2])[:60]
            found[f"{line.count(chr(13))} returns in a line of a log: {shown}"] += 1
        for name, pattern in _NOISE.items():
            if pattern.search(line):
                found[f"{name}: {_words(line)[:80]}"] += 1
        if not terminal and "\x1b" in line:
            found["a terminal sequence in a log"] += 1
    for line, times in Counter(line for line in lines if line.strip()).items():
        if times > 3:
            found[f"{times} times the same line: {_words(line)[:60]}"] += 1
    if re.search(r"\n\s*\n\s*\n", text):
        found["empty lines one after the other"] += 1
    return [f"{line} (x{times})" if times > 1 else line for line, times in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures the silences of a command.")
    parser.add_argument("--limit", type=float, default=2.0, help="seconds")
    parser.add_argument("--only", choices=("terminal", "pipe"))
    parser.add_argument("--show", action="store_true", help="also print what the command said")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after --")
    arguments = parser.parse_args()
    command = [word for i, word in enumerate(arguments.command) if i or word != "--"]
    if not command:
        parser.error("no command")
    report, bad = {}, False
    for kind in (arguments.only,) if arguments.only else ("terminal", "pipe"):
        recording = record(command, kind == "terminal")
        if arguments.show:
            for chunk in recording.chunks:
                print(f"{chunk.seconds:8.2f} {chunk.text!r}", file=sys.stderr)
        silences = recording.silences()
        lines = unhelpful(recording, kind == "terminal")
        too_long = [silence for silence in silences if silence.seconds > arguments.limit]
        bad = bad or bool(too_long or lines or recording.code)
        report[kind] = {
            "exit": recording.code,
            "seconds": round(recording.seconds, 1),
            "silences_over_limit": len(too_long),
            "longest_silences": [dataclasses.asdict(silence) for silence in silences[:_SHOWN]],
            "lines_that_do_not_help": lines,
        }
    print(json.dumps(report, indent=2, ensure_ascii=False))
    sys.exit(bad)


if __name__ == "__main__":
    main()
