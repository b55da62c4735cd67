"""Kills a batch at random moments, or shares it among processes, and compares the results.

The small shipped model on the CPU in float32. Every run works in a folder of its own under the same
relative names, so that all files of the jobs must be equal byte for byte to those of a run that
nothing disturbed. Prints JSON; ends with exit code 1 if anything was lost, differs, or was computed
again after it had been recorded as done. Processes are forked from one that has only imported the
libraries: killing imports would prove nothing and take most of the time.

    python benchmarks/batch_survives.py --jobs 30 --kills 50
    python benchmarks/batch_survives.py --jobs 30 --processes 4 --kills 1
    python benchmarks/batch_survives.py --jobs 12 --ray_workers 2 --kills 1
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

import batch
from jobs.records import OUTPUTS, StageRecord, read_batch
from runtime.exit_codes import run_script
from stages.files import CONFIG_FILE

ROOT = Path(__file__).resolve().parents[1]

# Height, width, frames, guidance: small, so that starting up is most of the time.
_SHAPES = [(32, 48, 5, 3), (48, 32, 9, 3), (32, 32, 9, 1), (32, 64, 5, 1), (48, 48, 9, 3)]
_OUTPUT_DIR = "batch"
_IMPORTED = [
    "jobs.runner",
    "stages.session",
    "cogvideox.denoising.program",
    "cogvideox.text.encoder",
]
_IMPORTED += [
    "cogvideox.vae.decode",
    "cogvideox.vae.decoder_torchax",
    "cogvideox.video.contact_sheet",
]
_IMPORTED += ["PIL.Image"]
_FORKS = multiprocessing.get_context("forkserver")

Done = dict[tuple[str, str], StageRecord]  # (job's folder, stage) -> its record


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=30)
    parser.add_argument("--kills", type=int, default=0, help="processes killed with SIGKILL")
    parser.add_argument("--processes", type=int, default=1, help="at once on one folder")
    parser.add_argument("--ray_workers", type=int, default=0, help="run over a local Ray cluster")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    arguments = parser.parse_args()
    os.environ |= {"JAX_PLATFORMS": "cpu"}
    _FORKS.set_forkserver_preload(_IMPORTED)
    with tempfile.TemporaryDirectory() as folder:
        report = prove(Path(folder), arguments)
    print(json.dumps(vars(arguments) | report, indent=2))
    sys.exit(0 if report["equal"] and not report["computed_again"] else 1)


def prove(folder: Path, arguments: argparse.Namespace) -> dict:
    (folder / "jobs.jsonl").write_text("".join(map(job_line, range(arguments.jobs))))
    whole, broken = folder / "whole", folder / "broken"
    start = time.monotonic()
    finish(whole)
    seconds = time.monotonic() - start
    if arguments.ray_workers:
        killed, seen = share_over_ray(broken, arguments.ray_workers, arguments.kills)
    elif arguments.processes > 1:
        killed, seen = share(broken, arguments.processes, arguments.kills)
    else:
        killed, seen = kill_often(broken, arguments.kills, random.Random(arguments.seed))
    finish(broken)
    states = read_batch(broken / _OUTPUT_DIR)
    last = done_records(broken)
    attempts = Counter(record.attempt for record in last.values())
    workers = {record.worker for record in last.values()}
    return {
        "seconds_undisturbed": round(seconds, 1),
        "killed": killed,
        "jobs_done": sum(state.status == "done" for state in states),
        "stages_done": len(last),
        "attempts_of_stages": dict(sorted(attempts.items())),
        "processes_that_did_work": len(workers),
        "computed_again": sum(last.get(key) != record for key, record in seen.items()),
        "files_compared": len(files(whole)),
        "equal": files(whole) == files(broken) and len(states) == arguments.jobs,
    }


def job_line(i: int) -> str:
    height, width, frames, guidance = _SHAPES[i % len(_SHAPES)]
    job = {"prompt": f"a red circle moves left {i}", "size": f"{height}x{width}", "seed": i}
    job |= {"frames": frames, "guidance": guidance, "steps": 2 + i % 4}
    return json.dumps(job | {"scheduler": "ddim" if i % 3 == 0 else "dpm"}) + "\n"


def start_batch(folder: Path, *more: str) -> BaseProcess:
    folder.mkdir(exist_ok=True)
    process = _FORKS.Process(target=_batch, args=(folder, more))
    process.start()
    return process


def _batch(folder: Path, more: tuple[str, ...]) -> None:
    """Runs batch.py in `folder`, in a separate process."""
    os.chdir(folder)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["batch.py", "../jobs.jsonl", "--output_dir", _OUTPUT_DIR, "--dtype=float32"]
    sys.argv += ["--model_id", str(ROOT / "models/toyworld"), "--allow_unsupported"]
    sys.argv += ["--checkpoint_every=1", *more]
    run_script(batch.main)


def wait(process: BaseProcess, folder: Path) -> None:
    """Waits for a process that must succeed."""
    process.join()
    if process.exitcode:
        sys.exit((folder / "log.txt").read_text()[-4000:])


def finish(folder: Path) -> None:
    wait(start_batch(folder), folder)


def done_records(folder: Path) -> Done:
    output_dir = folder / _OUTPUT_DIR
    states = read_batch(output_dir) if output_dir.exists() else []
    return {
        (state.folder.name, stage): record
        for state in states
        for stage, record in state.records.items()
        if record.status == "done"
    }


def kill_often(folder: Path, kills: int, moments: random.Random) -> tuple[int, Done]:
    """Kills one run after another; returns how many, and what was done.

    Each kill comes a random time after a random number of further stages, possibly 0.
    """
    seen: Done = {}
    stages = len((folder.parent / "jobs.jsonl").read_text().splitlines()) * len(OUTPUTS)
    for kill in range(kills):
        share_of_rest = (stages - len(seen)) / (kills - kill)
        more = moments.randint(0, round(2 * share_of_rest))
        wanted = min(len(seen) + more, stages - 1)
        process = start_batch(folder)
        if wanted == len(seen):  # somewhere in the start-up, or in the first stage
            time.sleep(moments.uniform(0, 5))
        while len(done_records(folder)) < wanted and process.is_alive():
            time.sleep(0.05)
        time.sleep(moments.uniform(0, 0.5))
        if not process.is_alive():
            print(f"finished after {kill} kills", file=sys.stderr)
            return kill, seen
        process.kill()
        process.join()
        now = done_records(folder)
        lost = [key for key, record in seen.items() if now.get(key) != record]
        if lost:
            sys.exit(f"computed again: {lost}")
        seen = now
        print(f"kill {kill + 1}: {len(seen)} of {stages} stages done", file=sys.stderr)
    return kills, seen


def share(folder: Path, processes: int, kills: int) -> tuple[int, Done]:
    """Runs several processes on one folder; `kills` of them are killed after the first videos."""
    running = [start_batch(folder) for _ in range(processes)]
    seen: Done = {}
    for process in running[:kills]:
        while len(done_records(folder)) < len(seen) + 3 and process.is_alive():
            time.sleep(0.05)
        process.kill()
        process.join()
        seen = done_records(folder)
    for process in running[kills:]:
        wait(process, folder)
    return kills, done_records(folder)


def share_over_ray(folder: Path, workers: int, kills: int) -> tuple[int, Done]:
    """Runs a Ray cluster on this machine; `kills` of its workers are killed midway."""
    driver = start_batch(folder, "--engine=ray", f"--workers_per_node={workers}")
    killed: set[int] = set()
    while driver.is_alive():
        time.sleep(0.2)
        records = done_records(folder).values()
        alive = {int(r.worker.rpartition(":")[2]) for r in records} - killed
        if len(killed) < kills and len(records) > 3 and alive:
            victim = min(alive)
            os.kill(victim, signal.SIGKILL)
            killed.add(victim)
    wait(driver, folder)
    return len(killed), done_records(folder)


def files(folder: Path) -> dict[str, bytes]:
    """Returns what the stages wrote, by name."""
    names = [name for outputs in OUTPUTS.values() for name in outputs] + [CONFIG_FILE]
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for name in names
        for path in (folder / _OUTPUT_DIR).glob(f"*/{name}")
    }
    return found


if __name__ == "__main__":
    main()
