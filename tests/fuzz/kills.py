"""Kills each stage with SIGKILL at random moments of a run, and runs it again.

    python -m tests.fuzz.kills --kills 50

After a kill every file is the old one or the new one, and what is not of the run is as it was; the
next run ends well and leaves the bytes of an undisturbed run and no temporary file. Only kills that
ended a running process count. Prints JSON; exit code 1 if anything was lost.
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
from collections import Counter
from pathlib import Path

from tests.fuzz.harness import Snapshot, World, changes, make_world, snapshot
from tests.fuzz.stages import OUTPUTS, STAGE2, STAGE3, Stages


def main() -> None:
    parser = argparse.ArgumentParser(description="Kills stages at random moments.")
    parser.add_argument("--kills", type=int, default=50, help="of each stage")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    report = {}
    with make_world() as world:
        stages = Stages(world)
        for argv in (stages.stage1, STAGE2, STAGE3):
            moments = random.Random(f"{argv[0]} {arguments.seed}")
            report[argv[0]] = kill_often(world, stages, argv, arguments.kills, moments)
    print(json.dumps(report, indent=2))
    sys.exit(any(stage["problems"] for stage in report.values()))


def kill_often(
    world: World, stages: Stages, argv: list[str], kills: int, moments: random.Random
) -> dict[str, object]:
    """Kills `kills` runs of a stage; a third of the next runs is killed, too."""
    start = time.monotonic()
    folder = world.root / "kills"
    before = snapshot(stages.before[argv[0]])
    after = snapshot(stages.after[argv[0]])
    hits = missed = mixed = left = 0
    problems: Counter[str] = Counter()
    whole = _whole_run(world, stages, argv, folder)
    while hits < kills:
        _renew(stages, argv, folder)
        again = True
        while again and hits < kills:
            if not kill_once(world, argv, folder, moments.uniform(0, whole)):
                missed += 1
                break
            hits += 1
            found = snapshot(folder / "run")
            problems.update(_half_files(argv, before, after, found))
            states = {found.get(name) == after[name] for name in OUTPUTS[argv[0]]}
            mixed += len(states) > 1
            left += any(name not in after for name in changes(before, found))
            again = moments.random() < 1 / 3
        ended = world.start(*argv, cwd=folder).wait()
        if ended.code:
            problems[f"the next run ended with {ended.code}: {ended.err[-300:]}"] += 1
        different = changes(after, snapshot(folder / "run"))
        problems.update(f"after the next run: {name} is not as it should be" for name in different)
    return {
        "kills_that_hit": hits,
        "runs_that_ended_before": missed,
        "seconds_of_a_run": round(whole, 2),
        "seconds": round(time.monotonic() - start, 1),
        "left_a_temporary_file": left,
        "left_old_beside_new": mixed,
        "problems": dict(problems),
    }


def _half_files(argv: list[str], before: Snapshot, after: Snapshot, found: Snapshot) -> list[str]:
    """Returns files that are neither the old nor the new one; skips hidden temporary names."""
    problems = []
    for name in changes(before, found):
        hidden = Path(name).name.startswith(".") and name not in before
        new = name in OUTPUTS[argv[0]] and found.get(name) == after[name]
        if not hidden and not new:
            problems.append(f"after a kill: {name} is neither the old nor the new file")
    return problems


def kill_once(world: World, argv: list[str], folder: Path, moment: float) -> bool:
    """Kills a run after `moment` seconds; False if it had ended. What it started lives on."""
    run = world.start(*argv, cwd=folder)
    time.sleep(moment)
    if os.waitid(os.P_PID, run.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        os.kill(run.pid, signal.SIGKILL)
    _, status = os.waitpid(run.pid, 0)
    return os.WIFSIGNALED(status)


def _renew(stages: Stages, argv: list[str], folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copytree(stages.before[argv[0]], folder / "run")


def _whole_run(world: World, stages: Stages, argv: list[str], folder: Path) -> float:
    """Returns the seconds of an undisturbed run."""
    _renew(stages, argv, folder)
    return world.run(*argv, cwd=folder).seconds


if __name__ == "__main__":
    main()
