"""Measures what a LoRA adds to the start of stage 2, and how long a change of LoRAs takes.

    python benchmarks/startup.py --make_model /disk/model      # random weights, 12 GB, once
    python benchmarks/lora.py --model_id /disk/model --json

The LoRAs are random, bfloat16, of all attention layers. Each start is a process of its own with
executables from compile_ahead.py, ended before its first step; the first one warms the page cache
and is not counted. The changes are those of one session: the base model, a LoRA, another LoRA, the
base model again.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import startup

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model_id", type=Path, required=True, help="a folder of startup.py")
    parser.add_argument("--size", default="768x1360x81", help="height x width x frames")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--starts", type=int, default=3, help="with and without the LoRA, each")
    parser.add_argument("--json", action="store_true", help="print nothing but JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.child:
        print(json.dumps(time_changes(**json.loads(arguments.child))))
        return
    model = arguments.model_id.resolve()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(work / "cache")}
        loras = [write_lora(model, work / f"{i}.safetensors", arguments.rank, i) for i in (0, 1)]
        startup.write_embeddings(model, work)
        startup.compile_ahead(
            model,
            argparse.Namespace(size=arguments.size, decoders=[]),
            work / "executables",
            environment,
        )
        report = {
            "size": arguments.size,
            "rank": arguments.rank,
            "lora_bytes": loras[0].stat().st_size,
            **time_starts(arguments, work, loras[0], environment),
            "session": run_child(
                [__file__, "--model_id", str(model), "--child", json.dumps(
                    {"model": str(model), "work": str(work), "size": arguments.size,
                     "loras": list(map(str, loras))}
                )],
                environment,
            ),
        }  # fmt: skip
    print(json.dumps(report) if arguments.json else json.dumps(report, indent=1))


def write_lora(model: Path, path: Path, rank: int, seed: int) -> Path:
    """Writes a random LoRA of all attention layers, in diffusers' format."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    from cogvideox.model.config import TransformerConfig

    config = TransformerConfig.from_file(model / "transformer/config.json")
    noise = np.random.default_rng(seed).standard_normal(1 << 20, np.float32)
    tensors = {}
    for block in range(config.num_layers):
        for name in ATTENTION:
            for factor, shape in (("A", (rank, config.width)), ("B", (config.width, rank))):
                key = f"transformer.transformer_blocks.{block}.attn1.{name}.lora_{factor}.weight"
                tensors[key] = np.resize((0.01 * noise).astype(ml_dtypes.bfloat16), shape)
    save_file(tensors, path)
    return path


def run_child(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Runs Python; returns the JSON of its last line."""
    done = subprocess.run(
        [sys.executable, *command], check=True, env=environment, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def time_starts(
    arguments: argparse.Namespace, work: Path, lora: Path, environment: dict[str, str]
) -> dict[str, Any]:
    """Seconds from process start to the first step, without and with a LoRA."""
    stage = ["--input_dir", str(work), "--num_inference_steps", "2", "--allow_unsupported"]
    stage += ["--executables", str(work / "executables")]
    for flag, value in zip(
        ("--height", "--width", "--num_frames"), arguments.size.split("x"), strict=True
    ):
        stage += [flag, value]
    runs: dict[str, list[dict[str, Any]]] = {"base": [], "lora": []}
    for number in range(arguments.starts + 1):
        for kind, more in (("base", []), ("lora", ["--lora", str(lora)])):
            whole = [*stage, "--output_dir", str(work / kind), *more]
            command = [startup.__file__, "--child", json.dumps(whole), "--no_steps"]
            row = run_child(command, environment)
            if number:
                runs[kind].append(row)
    seconds = {
        kind: statistics.median(row["seconds_to_first_step"] for row in rows)
        for kind, rows in runs.items()
    }
    return {
        "device": runs["base"][0]["device"],
        "seconds_to_first_step": seconds,
        "added_seconds": round(seconds["lora"] - seconds["base"], 2),
        "phases": {kind: rows[-1]["seconds"] for kind, rows in runs.items()},
        "compilations": runs["lora"][-1]["compilations"],
    }


def time_changes(model: str, work: str, size: str, loras: list[str]) -> dict[str, Any]:
    """Seconds of each change in one session, and the compilations of all of them."""
    from cogvideox.model.folder import find_model
    from cogvideox.model.settings import DenoisingSettings
    from runtime.compilation import CompilationLog
    from stages.decode import DecodeOptions
    from stages.denoise_options import DenoiseOptions
    from stages.encode import EncodeOptions
    from stages.sections import DENOISE
    from stages.session import Session, VideoRequest
    from stages.speed import Lossy

    folder, found = Path(work), find_model(model, ["transformer", "scheduler", "vae"])
    height, width, frames = map(int, size.split("x"))
    settings = DenoisingSettings(height, width, frames, 16, 2, 6.0, False, "dpm", 0)
    tokens = found.transformer.max_text_seq_length

    def request(*lora: str) -> VideoRequest:
        return VideoRequest(
            settings,
            EncodeOptions(["noise"], model, "bfloat16", folder),
            DenoiseOptions(
                folder, folder, "bfloat16", 0, num_inference_steps=2, height=height, width=width,
                num_frames=frames, allow_unsupported=True, lossy=Lossy(), lora=lora,
                executables=folder / "executables",
            ),
            DecodeOptions(folder, "bfloat16", "torchax", fps=16),
            tokens,
        )  # fmt: skip

    first, second = loras
    steps = {
        "base": request(),
        "lora": request(first),
        "another lora": request(second),
        "another weight": request(f"{second}=0.5"),
        "base again": request(),
    }
    never = threading.Event()
    session = Session(found, never, never, lambda folder, states, **_: states)
    session.check(list(steps.values()), [DENOISE], folder)
    seconds, log = {}, None
    for name, one in steps.items():
        start = time.perf_counter()
        session.prepare(DENOISE, one)
        seconds[name] = round(time.perf_counter() - start, 2)
        log = log or CompilationLog()  # of the changes, without the first load
    assert log is not None
    return {"seconds": seconds, "compilations_of_changes": log.summary()}


if __name__ == "__main__":
    main()
