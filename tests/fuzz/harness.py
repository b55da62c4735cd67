"""Runs the scripts of this project many times, fast, and judges how each run ended.

The process that uses this imports the heavy libraries once and forks a child for every run, so a
run that refuses its input takes milliseconds. The children execute the scripts as `__main__`:
the tests depend on command lines and file formats only. This process never starts JAX's backend
or torch's threads; whatever needs them runs in a child.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import re
import runpy
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT = 20.0  # seconds of a run, on a machine whose cores are free
MEMORY_LIMIT = 2 << 30  # bytes, of the process with its imports
_POLL_SECONDS = 0.01

# A small video: a run of all three stages takes less than two seconds once programs are cached.
PROMPT = "A red cat"
DENOISE = ["--height=32", "--width=48", "--num_frames=5", "--num_inference_steps=2"]
DENOISE += ["--allow_unsupported", "--dtype=float32"]


@dataclasses.dataclass
class Ended:
    """How a run ended."""

    code: int  # negative: killed by that signal
    out: str
    err: str
    seconds: float
    peak_bytes: int
    limit: str = ""  # "time" or "memory" if the run was killed for it


class Run:
    """A forked child that executes a script."""

    def __init__(self, argv: Sequence[str], cwd: Path, logs: Path, environment: dict[str, str]):
        """
        Args:
            argv: name of a script in the project's root, and its arguments.
            logs: existing folder for the files `stdout` and `stderr`.
        """
        self._logs = logs
        self._start = time.monotonic()
        self._peak = 0
        self._limit = ""
        self.ended: Ended | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _execute(argv, cwd, logs, environment)

    def poll(self) -> Ended | None:
        """Checks the child once: whether it ended, its time and its memory."""
        if self.ended:
            return self.ended
        pid, status, usage = os.wait4(self.pid, os.WNOHANG)
        seconds = time.monotonic() - self._start
        if pid:
            self._kill_group()
            self._peak = max(self._peak, usage.ru_maxrss * 1024)
            code = os.waitstatus_to_exitcode(status)
            out, err = (
                (self._logs / name).read_text("utf-8", "replace") for name in ("stdout", "stderr")
            )
            self.ended = Ended(code, out, err, seconds, self._peak, self._limit)
            return self.ended
        self._peak = max(self._peak, _resident_bytes(self.pid))
        if self._peak > MEMORY_LIMIT:
            self._limit = "memory"
        elif seconds > TIME_LIMIT:
            # A busy machine gives a run less of its time; one that only waits gets no more.
            crowd = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
            if seconds > TIME_LIMIT * crowd or _cpu_seconds(self.pid) < TIME_LIMIT / 4:
                self._limit = "time"
        if self._limit:
            self.kill()
        return None

    def wait(self) -> Ended:
        while not self.poll():
            time.sleep(_POLL_SECONDS)
        assert self.ended
        return self.ended

    def kill(self) -> None:
        """Sends SIGKILL to the child and to the processes it started (ffmpeg)."""
        os.killpg(self.pid, signal.SIGKILL)

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def _cpu_seconds(pid: int) -> float:
    """Returns the CPU time of a child and of the processes that it waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _execute(argv: Sequence[str], cwd: Path, logs: Path, environment: dict[str, str]) -> None:
    """Runs the script in the child and exits as the interpreter would."""
    code = 70
    try:
        os.setsid()
        for number, name in ((0, None), (1, "stdout"), (2, "stderr")):
            flags = os.O_RDONLY if name is None else os.O_WRONLY | os.O_CREAT | os.O_APPEND
            os.dup2(os.open(logs / name if name else os.devnull, flags, 0o644), number)
        for number, mode in ((1, "stdout"), (2, "stderr")):
            errors, lines = ("strict", False) if number == 1 else ("backslashreplace", True)
            file = open(number, "w", 1 if lines else -1, "utf-8", errors, closefd=False)
            setattr(sys, mode, file)
        os.environ |= environment
        os.chdir(cwd)
        sys.argv = [str(ROOT / argv[0]), *map(str, argv[1:])]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 1
        threading._shutdown()  # type: ignore[attr-defined]  # joins threads, as the end of the interpreter does
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


class World:
    """A private folder, a small model, a compilation cache, and forked runs."""

    def __init__(self, root: Path):
        self.root = root
        self.model = root / "model"
        self.environment = {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(root / "cache"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
            "HOME": str(root / "home"),
            "TMPDIR": str(root / "tmp"),
        }
        for name in ("home", "tmp", "logs"):
            (root / name).mkdir()
        self.number = 0  # of the latest run; its output is in logs/NUMBER

    def start(self, *argv: str, cwd: Path, environment: dict[str, str] | None = None) -> Run:
        self.number += 1
        logs = self.root / "logs" / str(self.number)
        logs.mkdir()
        return Run(argv, cwd, logs, environment or {})

    def run(self, *argv: str, cwd: Path) -> Ended:
        """Runs a script that must succeed."""
        ended = self.start(*argv, cwd=cwd).wait()
        if ended.code:
            raise RuntimeError(f"{argv} ended with {ended.code} {ended.limit}: {ended.err[-3000:]}")
        return ended


@contextlib.contextmanager
def make_world(keep: bool = False) -> Iterator[World]:
    """Makes a world with its libraries imported and its programs compiled."""
    root = Path(tempfile.mkdtemp(prefix="fuzz_")).resolve()
    owner = os.getpid()
    try:
        world = World(root)
        os.environ |= world.environment
        _save_model(world)
        _import_libraries(world)
        yield world
    finally:
        if os.getpid() == owner:
            if keep:
                print(f"kept {root}", file=sys.stderr)
            else:
                shutil.rmtree(root)


def _save_model(world: World) -> None:
    code = "import sys, pathlib; from tests.tiny_models import save_tiny_model as save; "
    code += "save(pathlib.Path(sys.argv[1]))"
    subprocess.run(
        [sys.executable, "-c", code, str(world.model)],
        check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


_LIST_MODULES = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end
finally:
    names = [n for n, m in sys.modules.items() if getattr(m, "__spec__", None)]
    open("modules.txt", "w").write(repr(names))
"""


def _import_libraries(world: World) -> None:
    """Imports all modules that a batch of one job imports."""
    folder = world.root / "first"
    folder.mkdir()
    (folder / "jobs.jsonl").write_text(job_line(0))
    command = [sys.executable, "-c", _LIST_MODULES, str(ROOT / "batch.py"), *batch_arguments(world)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    sys.path.insert(0, str(ROOT))
    for name in ast.literal_eval((folder / "modules.txt").read_text()):
        if name != "__main__":
            # Some modules import only from within others, after those have set something up.
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    threads = [thread.name for thread in threading.enumerate()]
    assert len(threads) == 1, f"forking with threads {threads}"


def job_line(i: int) -> str:
    job = {"prompt": f"{PROMPT} {i}", "name": f"job{i}", "seed": i}
    job |= {"size": "32x48", "frames": 5, "steps": 2}
    return json.dumps(job) + "\n"


def batch_arguments(world: World, jobs: str = "jobs.jsonl") -> list[str]:
    arguments = [jobs, "--output_dir=batch", "--dtype=float32", "--allow_unsupported"]
    return [*arguments, f"--model_id={world.model}"]


# Files -------------------------------------------------------------------------------------------

Snapshot = dict[str, str]
_HASHED_BYTES = 64 << 20
# Ends of the names that any run may write or change.
_TIMINGS = "_timings.json"


def snapshot(folder: Path) -> Snapshot:
    """Describes each path in a folder by one word. Opens regular files only."""
    found: Snapshot = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        name = str(path.relative_to(folder))
        if stat.S_ISLNK(info.st_mode):
            found[name] = f"link {os.readlink(path)}"
        elif stat.S_ISREG(info.st_mode):
            found[name] = file_digest(path)
        else:
            found[name] = f"type {stat.S_IFMT(info.st_mode):o}"
    return found


def file_digest(path: Path) -> str:
    size = path.stat().st_size
    if size > _HASHED_BYTES:
        return f"file of {size}"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def changes(before: Snapshot, after: Snapshot) -> list[str]:
    """Returns the names that are new, gone or different, except reports of timings."""
    names = sorted(before.keys() | after.keys())
    changed = [name for name in names if before.get(name) != after.get(name)]
    return [name for name in changed if not name.endswith(_TIMINGS)]


def copy_tree(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target, symlinks=True))


# Judgement ---------------------------------------------------------------------------------------

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x9b]")


@dataclasses.dataclass
class Case:
    """One damaged input, the command that reads it, and what must hold afterwards."""

    what: str  # describes the damage
    folder: Path  # all of the case's files
    argv: list[str]
    # Problems of a run that ended with exit code 0, given the files that it changed.
    right: Callable[[Ended, list[str]], list[str]]
    # Paths, relative to the folder, that a run with another exit code may change.
    may_change: Callable[[str], bool] = lambda _: False
    codes: tuple[int, ...] = (0, 2)
    # Lines on stderr, before the last, that a refusal may have.
    listed: re.Pattern[str] = re.compile(r"(?!)")
    before: Snapshot = dataclasses.field(default_factory=dict)


def judge(case: Case, ended: Ended) -> list[str]:
    """Returns the problems of how a case ended, the worst first; none for a good end."""
    problems = []
    if ended.limit == "time":
        problems.append(f"hang: more than {TIME_LIMIT:.0f} s")
    elif ended.limit == "memory" or ended.peak_bytes > MEMORY_LIMIT:
        problems.append(f"memory: more than {MEMORY_LIMIT >> 30} GiB")
    elif ended.code < 0:
        problems.append(f"died of signal {-ended.code}")
    found = traceback_of(ended.err) or traceback_of(ended.out)
    if found:
        problems.append(f"traceback: {found}")
    if not problems and ended.code not in case.codes:
        problems.append(f"exit {ended.code}: {last_line(ended.err)}")
    if not problems and ended.code == 2:
        problems += refusal_problems(ended.err, case.listed)
    changed = changes(case.before, snapshot(case.folder))
    if ended.code == 0:
        problems += case.right(ended, changed)
    else:
        lost = [name for name in changed if not case.may_change(name)]
        if lost:
            problems.append(f"exit {ended.code}, but changed {lost[0]}")
    raw = _CONTROL.search(ended.out + ended.err)
    if raw:
        problems.append(f"raw control character {raw[0]!r} on the terminal")
    return problems


def refusal_problems(err: str, listed: re.Pattern[str]) -> list[str]:
    lines = [line for line in err.splitlines() if not listed.match(line)]
    if not lines or not lines[-1].startswith("error: "):
        return [f"exit 2 without 'error: ': {last_line(err)}"]
    if len(lines) > 1:
        return [f"exit 2 with more than one line: {generic(lines[0])}"]
    if len(lines[0]) > 5000:
        return ["exit 2 with a line of more than 5000 characters"]
    return []


def traceback_of(text: str) -> str:
    """Returns our last frame and the exception of a traceback or a panic in `text`."""
    if "Traceback (most recent call last)" in text:
        end = text[text.rindex("Traceback (most recent call last)") :]
        frames = [(Path(f).name, name) for f, _, name in _FRAME.findall(end) if str(ROOT) in f]
        place = f"{frames[-1][0]}:{frames[-1][1]}" if frames else "?"
        unindented = [line for line in end.splitlines()[1:] if line and line[0] not in " \t"]
        return f"{unindented[0].partition(':')[0] if unindented else '?'} in {place}"
    return "panic" if "panicked at" in text else ""


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return generic(lines[-1]) if lines else "(silent)"


def generic(line: str) -> str:
    """Removes numbers and paths from a line, so that equal defects give equal lines."""
    return re.sub(r"\d+", "N", re.sub(r"/\S+", "PATH", line))[:160]
