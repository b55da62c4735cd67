"""Fills a small disk under each stage: at the start, and at every write.

    python -m tests.fuzz.full_disk

The disk is a tmpfs of this test's own (root only). Its size, or its number of inodes, is cut down
to what is used plus a little once the run loads weights, that is after its checks; step by step a
little more, until everything fits. A run must end with exit code 1 or 2 and one line that
says so, or with exit code 0 and the right files; old files stay or are replaced whole, and with
room the same command completes. Prints JSON; exit code 1 if anything ended badly, 77 if it cannot
mount.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.fuzz.harness import Ended, World, changes, generic, make_world, snapshot, traceback_of
from tests.fuzz.stages import CONFIG, OUTPUTS, STAGE2, STAGE3, Stages

_ROOM = "size=4g,nr_inodes=100k"
# What every stage says after its checks.
_CHECKED = "loading the "
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclasses.dataclass(frozen=True)
class Disk:
    """A mounted tmpfs."""

    path: Path

    def remount(self, options: str) -> None:
        command = ["mount", "-o", f"remount,{options}", str(self.path)]
        subprocess.run(command, check=True, capture_output=True)

    def leave(self, free_bytes: int) -> None:
        usage = os.statvfs(self.path)
        used = (usage.f_blocks - usage.f_bfree) * usage.f_frsize
        self.remount(f"size={max(_PAGE, used + free_bytes)}")  # a size of 0 is no limit

    def leave_inodes(self, free: int) -> None:
        usage = os.statvfs(self.path)
        self.remount(f"nr_inodes={usage.f_files - usage.f_ffree + free}")


@contextlib.contextmanager
def mounted(path: Path) -> Iterator[Disk]:
    """Mounts the disk. Raises PermissionError if this process may not mount."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", _ROOM, "tmpfs", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise PermissionError(done.stderr.strip())
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", str(path)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fills a small disk under each stage.")
    parser.add_argument("--steps", type=int, default=12, help="sizes of the disk for each stage")
    arguments = parser.parse_args()
    if os.geteuid() != 0 or not shutil.which("mount"):
        print("skipped: only root can mount a tmpfs")
        sys.exit(77)
    report = {}
    with make_world() as world:
        stages = Stages(world)
        try:
            with mounted(world.root / "disk") as disk:
                for argv in (stages.stage1, STAGE2, STAGE3):
                    report[argv[0]] = _Stage(world, stages, disk, argv).attack(arguments.steps)
        except PermissionError as error:
            print(f"skipped: {error}")
            sys.exit(77)
    print(json.dumps(report, indent=2))
    sys.exit(any(end["problems"] for stage in report.values() for end in stage["ends"]))


class _Stage:
    def __init__(self, world: World, stages: Stages, disk: Disk, argv: list[str]):
        self._world, self._stages, self._disk, self._argv = world, stages, disk, argv
        self._before = snapshot(stages.before[argv[0]])
        self._after = snapshot(stages.after[argv[0]])
        outputs = [stages.after[argv[0]] / name for name in OUTPUTS[argv[0]]]
        # Every file is there twice while it is written.
        self._needed = sum(-(-path.stat().st_size // _PAGE) * _PAGE for path in outputs) + 2 * _PAGE

    def attack(self, steps: int) -> dict[str, object]:
        disk, ends = self._disk, []
        pages = sorted({round(i * self._needed / _PAGE / steps) for i in range(steps + 1)})
        for free in [0, 8192]:
            ends.append(self._try(f"{free} bytes free at the start", lambda f=free: disk.leave(f)))
        for free in (page * _PAGE for page in pages):
            cut = lambda f=free: disk.leave(f)  # noqa: E731
            ends.append(self._try(f"{free} bytes free after the checks", later=cut))
        for free in range(4):
            ends.append(
                self._try(f"{free} inodes at the start", lambda f=free: disk.leave_inodes(f))
            )
            cut = lambda f=free: disk.leave_inodes(f)  # noqa: E731
            ends.append(self._try(f"{free} inodes after the checks", later=cut))
        ends.append(self._try("read-only at the start", lambda: disk.remount("ro")))
        ends.append(self._try("read-only after the checks", later=lambda: disk.remount("ro")))
        ends.append(self._without_folder())
        ends += [self._full_cache(free) for free in (0, 16384, 262144)]
        return {"runs": len(ends), "bad": sum(bool(end["problems"]) for end in ends), "ends": ends}

    def _try(
        self,
        what: str,
        first: Callable[[], None] | None = None,
        later: Callable[[], None] | None = None,
    ) -> dict[str, object]:
        """Runs the stage on a disk cut down by `first`, or by `later` after its checks."""
        folder = self._renew()
        if first:
            first()
        ended = self._run(folder, later)
        found = snapshot(folder / "run")
        problems = self._problems(ended)
        problems += self._lost(found, complete=ended.code == 0)
        self._disk.remount(f"rw,{_ROOM}")
        if ended.code:
            again = self._world.start(*self._argv, cwd=folder).wait()
            if again.code or changes(self._after, snapshot(folder / "run")):
                problems.append(f"the next run with room: exit {again.code}, {again.err[-200:]}")
        said = ended.err.strip().splitlines()
        return {"what": what, "exit": ended.code, "said": said[-1][-200:] if said else "",
                "problems": problems}  # fmt: skip

    def _without_folder(self) -> dict[str, object]:
        """Removes the folder while the stage runs."""
        folder = self._renew()
        ended = self._run(folder, lambda: shutil.rmtree(folder / "run"))
        problems = self._problems(ended)
        if ended.code == 0:
            problems.append("exit 0 with a folder that was removed")
        said = ended.err.strip().splitlines()
        return {"what": "folder removed", "exit": ended.code, "said": said[-1] if said else "",
                "problems": problems}  # fmt: skip

    def _full_cache(self, free: int) -> dict[str, object]:
        """Puts the compilation cache on a full disk, which must do no harm."""
        folder = self._renew()
        cache = folder / "cache"
        cache.mkdir()
        target = self._world.root / "beside"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        shutil.copytree(self._stages.before[self._argv[0]], target / "run")
        self._disk.leave(free)
        own = {"JAX_COMPILATION_CACHE_DIR": str(cache)}
        ended = self._world.start(*self._argv, cwd=target, environment=own).wait()
        self._disk.remount(f"rw,{_ROOM}")
        problems = self._problems(ended)
        problems += self._lost(snapshot(target / "run"), complete=ended.code == 0)
        said = ended.err.strip().splitlines()
        return {"what": f"{free} bytes free for the cache", "exit": ended.code,
                "said": said[-1][-200:] if said else "", "problems": problems}  # fmt: skip

    def _renew(self) -> Path:
        folder = self._disk.path / "case"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copytree(self._stages.before[self._argv[0]], folder / "run")
        return folder

    def _run(self, folder: Path, later: Callable[[], None] | None) -> Ended:
        run = self._world.start(*self._argv, cwd=folder)
        logs = self._world.root / "logs" / str(self._world.number)
        while later and not run.poll():
            if (logs / "stdout").exists() and _CHECKED in (logs / "stdout").read_text("utf-8"):
                later()
                break
            time.sleep(0.002)
        return run.wait()

    def _problems(self, ended: Ended) -> list[str]:
        problems = []
        if ended.limit:
            problems.append(f"over its {ended.limit} limit")
        found = traceback_of(ended.err)
        if found:
            problems.append(f"traceback: {found}")
        lines = ended.err.strip().splitlines()
        plain = bool(lines) and lines[-1].startswith(("error: ", "failed: "))
        if ended.code not in (0, 1, 2) or (ended.code and not plain and not found):
            problems.append(f"exit {ended.code}: {generic(lines[-1]) if lines else '(silent)'}")
        return problems

    def _lost(self, found: dict[str, str], complete: bool) -> list[str]:
        if complete:
            return [f"exit 0, but {n} is not right" for n in changes(self._after, found)]
        outputs = OUTPUTS[self._argv[0]]
        lost, new = [], []
        for name in changes(self._before, found):
            if name in outputs and found.get(name) == self._after[name]:
                new.append(name)
            else:
                lost.append(f"{name} is {'new' if name not in self._before else 'neither'}")
        problems = [f"a failed run, and {what}" for what in lost]
        if new and set(new) != set(outputs) and CONFIG not in new:
            problems.append(f"a failed run replaced {', '.join(new)} and not the rest")
        return problems


if __name__ == "__main__":
    main()
