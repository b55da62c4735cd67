"""Two batches on one folder: one is stopped past its claim's expiry and woken, one is killed.

    python -m tests.fuzz.two_batches --rounds 5

In every round a first batch is stopped at a random moment while it works on a job, a second one
takes over, a third one is killed at a random moment, and the first is woken; then the same command
runs alone. All files of the jobs must equal a lone run's, and no record may turn from "done" into
anything else. Prints JSON; exit code 1 if something did.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time

from tests.fuzz.batches import made_files
from tests.fuzz.harness import (
    Run,
    World,
    batch_arguments,
    changes,
    job_line,
    make_world,
    snapshot,
    traceback_of,
)  # fmt: skip

_JOBS = 4
_EXPIRY = 2.0  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Two batches on one folder.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with make_world() as world:
        good, seconds = lone_run(world)
        rounds = []
        for number in range(arguments.rounds):
            moments = random.Random(f"{arguments.seed} {number}")
            rounds.append(Round(world, good, number).play(moments, seconds))
            print(json.dumps(rounds[-1]), file=sys.stderr)
    bad = sum(bool(played["problems"]) for played in rounds)
    print(json.dumps({"seconds_of_a_lone_run": round(seconds, 1), "bad": bad, "rounds": rounds}))
    sys.exit(bool(bad))


def lone_run(world: World) -> tuple[dict[str, str], float]:
    folder = world.root / "lone"
    folder.mkdir()
    (folder / "jobs.jsonl").write_text("".join(map(job_line, range(_JOBS))))
    start = time.monotonic()
    world.run("batch.py", *batch_arguments(world), cwd=folder)
    return made_files(folder / "batch"), time.monotonic() - start


class Round:
    """Three batches on one folder, and all states of its records during the round."""

    def __init__(self, world: World, good: dict[str, str], number: int):
        self._world, self._good = world, good
        self._folder = world.root / f"round{number}"
        self._folder.mkdir()
        shutil.copyfile(world.root / "lone/jobs.jsonl", self._folder / "jobs.jsonl")
        self._statuses: dict[str, str] = {}
        self._problems: list[str] = []

    def play(self, moments: random.Random, seconds: float) -> dict[str, object]:
        start = time.monotonic()
        first = self._start()
        if moments.random() < 0.5:  # while it works
            self._watch(lambda: bool(self._claimed_by(first)), first)
            self._watch_for(moments.uniform(0, seconds / 2), first)
        else:  # before it records that it has begun
            some = moments.randint(1, _JOBS)
            self._wait_for_claims(some, first)
            time.sleep(moments.uniform(0, 0.004))
        stopped = self._claimed_by(first)
        os.kill(first.pid, signal.SIGSTOP)
        second = self._start()
        self._watch_for(moments.uniform(0, seconds))
        third = self._start()
        self._watch_for(moments.uniform(0, seconds))
        killed = not third.poll()
        if killed:
            third.kill()
        third.wait()
        self._watch_for(_EXPIRY + moments.uniform(0.5, 3))
        os.kill(first.pid, signal.SIGCONT)
        for run in (first, second):
            self._watch(lambda run=run: bool(run.poll()), run)
            self._check_end(run)
        last = self._start()
        self._watch(lambda: bool(last.poll()), last)
        self._check_end(last, alone=True)
        made = made_files(self._folder / "batch")
        names = sorted(made.keys() | self._good.keys())
        different = [name for name in names if made.get(name) != self._good.get(name)]
        self._problems += [f"{name} is not the lone run's" for name in different]
        statuses = self._read()
        self._problems += [f"{n} ends as {s}" for n, s in statuses.items() if s != "done"]
        before = snapshot(self._folder)
        again = self._world.start("batch.py", *batch_arguments(self._world), cwd=self._folder)
        again.wait()
        redone = [name for name in changes(before, snapshot(self._folder)) if "stage" in name]
        self._problems += [f"made again though done: {name}" for name in redone]
        return {
            "seconds": round(time.monotonic() - start, 1),
            "stopped_with_a_claim_on": sorted(stopped),
            "killed_a_running_one": killed,
            "problems": self._problems,
        }

    def _start(self) -> Run:
        expiry = f"--claim_expiry={_EXPIRY}"
        arguments = [*batch_arguments(self._world), "--checkpoint_every=1", expiry]
        return self._world.start("batch.py", *arguments, cwd=self._folder)

    def _check_end(self, run: Run, alone: bool = False) -> None:
        ended = run.wait()
        found = traceback_of(ended.err + ended.out)
        if found:
            self._problems.append(f"traceback: {found}")
        elif ended.code or ended.limit:
            name = "the last" if alone else "a"
            self._problems.append(f"{name} batch ended with {ended.code} {ended.limit}")

    def _claimed_by(self, run: Run) -> set[str]:
        """Returns the jobs whose last claim belongs to this run and is not released."""
        found = set()
        for folder in (self._folder / "batch").glob("job*/claims"):
            claims = [path for path in folder.iterdir() if path.name.isdecimal()]
            if not claims:
                continue
            last = max(claims, key=lambda path: int(path.name))
            try:
                if json.loads(last.read_text())["pid"] == run.pid and last.stat().st_mtime:
                    found.add(folder.parent.name)
            except (OSError, ValueError, KeyError):
                self._problems.append("a claim that cannot be read")
        return found

    def _wait_for_claims(self, number: int, run: Run) -> None:
        """Waits, without a pause, until that many claims have been made."""
        while sum(1 for _ in self._folder.glob("batch/job*/claims/[0-9]*")) < number:
            if run.poll():
                return

    def _watch_for(self, seconds: float, *runs: Run) -> None:
        end = time.monotonic() + seconds
        self._watch(lambda: time.monotonic() > end, *runs)

    def _watch(self, condition, *runs: Run) -> None:
        """Reads the records until `condition` holds, or all of `runs` have ended."""
        while not condition() and not (runs and all(run.poll() for run in runs)):
            for name, status in self._read().items():
                was = self._statuses.get(name)
                if was == "done" and status != "done":
                    self._problems.append(f"{name} turned from done into {status}")
                self._statuses[name] = status
            time.sleep(0.005)

    def _read(self) -> dict[str, str]:
        statuses = {}
        for path in sorted((self._folder / "batch").glob("job*/stage*_record.json")):
            name = f"{path.parent.name}/{path.name}"
            try:
                statuses[name] = json.loads(path.read_text())["status"]
            except (OSError, ValueError) as error:
                self._problems.append(f"{name}: {type(error).__name__}")
        return statuses


if __name__ == "__main__":
    main()
