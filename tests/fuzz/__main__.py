"""Damages inputs with fixed seeds, runs the scripts on them, and reports what ended badly.

    python -m tests.fuzz                              # the full counts
    python -m tests.fuzz --slice                      # a few of each, for CI
    python -m tests.fuzz --kind configs --count 50 --seed 1
    python -m tests.fuzz --kind configs --only 17 --keep    # one case, its files kept

A good end is exit code 0 with the right result, or exit code 2 with one line on stderr that starts
with "error: ", no file of anybody's changed. Prints JSON; exit code 1 if a case ended badly.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from tests.fuzz.batches import Jobs, Tags
from tests.fuzz.harness import Case, Ended, Run, World, judge, make_world
from tests.fuzz.models import Models
from tests.fuzz.stages import Configs, StageFiles


class Kind(Protocol):
    """Makes the cases of one kind."""

    def make(self, rng: random.Random, folder: Path) -> Case: ...


KINDS: dict[str, Callable[[World], Kind]] = {
    "stage_files": StageFiles,
    "configs": Configs,
    "models": Models,
    "jobs": Jobs,
    "tags": Tags,
}
FULL_COUNTS = {"stage_files": 500, "configs": 500, "models": 200, "jobs": 200, "tags": 100}
SLICE_COUNTS = {"stage_files": 30, "configs": 30, "models": 20, "jobs": 15, "tags": 10}
_SHOWN_CASES = 4  # of one problem


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=KINDS, action="append", help="default: all")
    parser.add_argument("--count", type=int, help="cases of each kind (default: the full counts)")
    parser.add_argument("--slice", action="store_true", help="counts for CI")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--only", type=int, action="append", help="cases by number; repeatable")
    parser.add_argument("--keep", action="store_true", help="keep the files, and say where")
    parser.add_argument("--out", type=Path, help="write every bad case here, as JSON lines")
    arguments = parser.parse_args()
    report = {}
    with make_world(arguments.keep) as world:
        for name in arguments.kind or KINDS:
            counts = SLICE_COUNTS if arguments.slice else FULL_COUNTS
            numbers = arguments.only or range(arguments.count or counts[name])
            report[name] = fuzz(world, name, numbers, arguments)
    print(json.dumps(report, indent=2, ensure_ascii=True))
    sys.exit(any(kind["bad"] for kind in report.values()))


def fuzz(
    world: World, name: str, numbers: Sequence[int], arguments: argparse.Namespace
) -> dict[str, object]:
    """Runs the cases of a kind; returns counts, and every problem with some cases that show it."""
    start = time.monotonic()
    kind = KINDS[name](world)
    ready = time.monotonic()
    folder = world.root / "cases" / name
    folder.mkdir(parents=True)
    waiting, running = list(reversed(numbers)), list[tuple[int, Case, Run]]()
    codes: Counter[str] = Counter()
    problems: dict[str, list[dict[str, object]]] = {}
    bad, slowest, most = 0, 0.0, 0
    while waiting or running:
        while waiting and len(running) < arguments.jobs:
            number = waiting.pop()
            rng = random.Random(f"{name} {arguments.seed} {number}")
            case = kind.make(rng, folder / str(number))
            running.append((number, case, world.start(*case.argv, cwd=case.folder)))
        time.sleep(0.005)
        for number, case, run in [entry for entry in running if entry[2].poll()]:
            running.remove((number, case, run))
            ended = run.ended
            assert ended
            codes[f"exit {ended.code}" if not ended.limit else f"over {ended.limit}"] += 1
            slowest, most = max(slowest, ended.seconds), max(most, ended.peak_bytes)
            found = judge(case, ended)
            bad += bool(found)
            for problem in found:
                shown = _shown(number, case, ended)
                problems.setdefault(problem, []).append(shown)
                if arguments.out:
                    with open(arguments.out, "a") as file:
                        line = {"kind": name, "problem": problem, "err": ended.err[-3000:]} | shown
                        file.write(json.dumps(line) + "\n")
            if found:
                print(f"{name} {number}: {case.what[:100]!a}: {found[0]}", file=sys.stderr)
            if arguments.keep:
                print(f"{name} {number}: {shlex.join(case.argv)}\n{ended.err}", file=sys.stderr)
            else:
                shutil.rmtree(case.folder)
    most_first = sorted(problems.items(), key=lambda item: -len(item[1]))
    return {
        "seconds_preparing": round(ready - start, 1),
        "seconds": round(time.monotonic() - ready, 1),
        "cases": len(numbers),
        "bad": bad,
        "ended": dict(sorted(codes.items())),
        "slowest_s": round(slowest, 1),
        "peak_mib": most >> 20,
        "problems": {
            problem: {"count": len(cases), "cases": cases[:_SHOWN_CASES]}
            for problem, cases in most_first
        },
    }


def _shown(number: int, case: Case, ended: Ended) -> dict[str, object]:
    err = ended.err.strip().splitlines()
    return {
        "case": number,
        "what": case.what[:200],
        "command": shlex.join(case.argv)[:300],
        "code": ended.code,
        "seconds": round(ended.seconds, 1),
        "last": err[-1][:300] if err else "",
    }


if __name__ == "__main__":
    main()
