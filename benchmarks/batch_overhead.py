"""Measures the time per video in a batch against the stages' own run times.

Per video: a batch of N + 1 videos less a batch of one, over N, whole processes on the wall clock;
loading and compiling, which a batch does once, cancel. Against: what the three stage scripts report
for running and saving the same video, without starting, loading and compiling. Every program is in
the compilation cache before anything is timed. Prints JSON.

    python benchmarks/batch_overhead.py --videos 20
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_PROMPT = "a red circle moves left on a dark blue background"
_WORK = ("run", "save", "run and save")  # phases of the stages' timings


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--videos", type=int, default=20)
    parser.add_argument("--model_id", default=str(ROOT / "models/toyworld"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=3, help="of the stages; the median counts")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(vars(arguments) | measure(Path(folder), arguments), indent=2))


def measure(folder: Path, arguments: argparse.Namespace) -> dict:
    batch(folder, arguments, 1)  # fills the compilation cache
    runs = sorted(
        (stages(folder / f"stages{i}", arguments) for i in range(arguments.repeats)), key=sum
    )
    own = runs[len(runs) // 2]
    one = batch(folder, arguments, 1)
    many = batch(folder, arguments, arguments.videos + 1)
    each = (many - one) / arguments.videos
    return {
        "cpu_cores": os.cpu_count(),
        "stages_own_run_seconds": [round(seconds, 3) for seconds in own],
        "batch_of_one_seconds": round(one, 2),
        f"batch_of_{arguments.videos + 1}_seconds": round(many, 2),
        "seconds_a_video_in_the_batch": round(each, 3),
        "ratio": round(each / sum(own), 3),
    }


def stages(folder: Path, arguments: argparse.Namespace) -> list[float]:
    """Measures the seconds of the three scripts' own work, each in a separate process."""
    where, dtype = f"--input_dir={folder}", f"--dtype={arguments.dtype}"
    model = f"--model_id={arguments.model_id}"
    steps = f"--num_inference_steps={arguments.num_inference_steps}"
    run("stage1_text_encoder.py", f"--prompt={_PROMPT}", model, f"--output_dir={folder}", dtype)
    run("stage2_transformer.py", where, steps, dtype)
    run("stage3_vae_decoder.py", where, dtype)
    names = ("stage1_timings.json", "stage2_timings.json", "output_video_timings.json")
    tables = [json.loads((folder / name).read_text())["seconds"] for name in names]
    return [sum(table.get(phase, 0.0) for phase in _WORK) for table in tables]


def batch(folder: Path, arguments: argparse.Namespace, videos: int) -> float:
    """Measures the seconds of a batch from the start of its process to the end."""
    jobs = folder / "jobs.jsonl"
    jobs.write_text(json.dumps({"prompt": _PROMPT, "seeds": f"1-{videos}"}))
    with tempfile.TemporaryDirectory(dir=folder) as output_dir:
        start = time.perf_counter()
        run(
            "batch.py", str(jobs), f"--output_dir={output_dir}", f"--dtype={arguments.dtype}",
            f"--model_id={arguments.model_id}",
            f"--num_inference_steps={arguments.num_inference_steps}",
        )  # fmt: skip
        return time.perf_counter() - start


def run(script: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / script, *arguments], capture_output=True, text=True, cwd=ROOT
    )
    if done.returncode:
        sys.exit(done.stderr[-4000:])


if __name__ == "__main__":
    main()
