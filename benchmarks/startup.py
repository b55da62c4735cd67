"""Measures startup of a stage at full size: from process start to its first step or frames.

    python benchmarks/startup.py --make_model /disk/model        # random weights, 12 GB, once
    python benchmarks/startup.py --model_id /disk/model --json   # cold, cached, with executables
    python benchmarks/startup.py --model_id /disk/model --decoders torchax flax --json

Each run of stage 2 is a process of its own, ended after two steps, or with `--no_steps` before the
first; each decoder then makes an mp4 of the latents. `cold` compiles, with an empty compilation
cache; `cached` reads what `cold` left in the cache; `executables` reads what compile_ahead.py made,
with an empty cache; its latents and videos should be those of the runs before. `--drop_page_cache`
(needs root) has each run read the weights from the disk again.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DECODER_SCRIPTS = {"torchax": "stage3_vae_decoder.py", "flax": "stage3_vae_decoder_flax.py"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--make_model", type=Path, help="write a model of random weights and end")
    parser.add_argument("--model", default="CogVideoX1.5-5B", help="the published one to make")
    parser.add_argument("--layers", type=int, help="of the model to make (default: all)")
    parser.add_argument("--model_id", type=Path, help="a folder in diffusers layout")
    parser.add_argument("--size", default="768x1360x81", help="height x width x frames")
    parser.add_argument("--runs", nargs="+", default=["cold", "cached", "executables"])
    parser.add_argument("--drop_page_cache", action="store_true")
    parser.add_argument("--no_steps", action="store_true", help="and so compare no latents")
    parser.add_argument("--json", action="store_true", help="one JSON object a run")
    parser.add_argument("--decoders", nargs="+", choices=tuple(DECODER_SCRIPTS), default=[])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.decoders and arguments.no_steps:
        parser.error("--decoders need the latents that --no_steps leaves out")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.make_model:
        make_model(arguments)
    elif arguments.child:
        run_stage(json.loads(arguments.child), steps=not arguments.no_steps)
    else:
        compare(arguments)


def make_model(arguments: argparse.Namespace) -> None:
    """Writes a folder in diffusers layout: configs, and random weights of transformer and VAE."""
    import ml_dtypes
    import numpy as np
    import torch
    from diffusers import AutoencoderKLCogVideoX
    from published_models import TRANSFORMERS
    from safetensors.numpy import save_file

    from cogvideox.transformer.parameters import stored_shapes

    config = TRANSFORMERS[arguments.model]
    if arguments.layers:
        config = dataclasses.replace(config, num_layers=arguments.layers)
    scheduler = {
        "_class_name": "CogVideoXDPMScheduler",
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "snr_shift_scale": 1.0,
        "timestep_spacing": "trailing",
    }
    index = {
        "_class_name": "CogVideoXPipeline",
        "scheduler": ["diffusers", "CogVideoXDPMScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }
    folder = arguments.make_model
    for part in ("transformer", "scheduler"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "transformer/config.json").write_text(json.dumps(dataclasses.asdict(config)))
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(scaling_factor=0.7)
    torch.nn.Module.to(vae, torch.bfloat16)  # diffusers does not declare the arguments of `to`
    vae.save_pretrained(folder / "vae")

    noise = np.random.default_rng(0).standard_normal(1 << 20, np.float32)

    def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1 and "norm" in name and name.endswith("weight"):
            return np.ones(shape, ml_dtypes.bfloat16)
        scale = 0.02 if len(shape) == 1 else shape[-1] ** -0.5
        return np.resize((noise * scale).astype(ml_dtypes.bfloat16), shape)

    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in stored_shapes(config).items():
        if sum(2 * int(np.prod(s)) for s in shards[-1].values()) > 4 << 30:
            shards.append({})
        shards[-1][name] = shape
    weight_map = {}
    for i, shapes in enumerate(shards):
        file = f"diffusion_pytorch_model-{i + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {name: fill(name, shape) for name, shape in shapes.items()}
        save_file(tensors, folder / "transformer" / file)
        weight_map |= dict.fromkeys(shapes, file)
    index_file = folder / "transformer/diffusion_pytorch_model.safetensors.index.json"
    index_file.write_text(json.dumps({"weight_map": weight_map}))


def compare(arguments: argparse.Namespace) -> None:
    """Starts one process per run; prints a table or JSON."""
    model = arguments.model_id.resolve()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_embeddings(model, work)
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(work / "cache")}
        for run in arguments.runs:
            if run == "cold":
                shutil.rmtree(work / "cache", ignore_errors=True)
            stage = ["--input_dir", str(work), "--output_dir", str(work / run)]
            stage += ["--num_inference_steps", "2", "--allow_unsupported"]
            for flag, value in zip(
                ("--height", "--width", "--num_frames"), arguments.size.split("x"), strict=True
            ):
                stage += [flag, value]
            if run == "executables":
                compile_ahead(model, arguments, work / "executables", environment)
                shutil.rmtree(work / "cache", ignore_errors=True)
                stage += ["--executables", str(work / "executables")]
            if arguments.drop_page_cache:
                subprocess.run(["sync"], check=True)
                Path("/proc/sys/vm/drop_caches").write_text("3")
            done = subprocess.run(
                [sys.executable, __file__, "--child", json.dumps(stage)]
                + ["--no_steps"] * arguments.no_steps,
                check=True,
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
            rows = [json.loads(done.stdout.splitlines()[-1])]
            rows[0]["latents"] = None if arguments.no_steps else _digest(work / run)
            executables = work / "executables" if run == "executables" else None
            for decoder in arguments.decoders:
                rows.append(run_decoder(decoder, work / run, executables, environment))
            for row in rows:
                row = {"run": run, "size": arguments.size, **row}
                row["page_cache"] = "dropped" if arguments.drop_page_cache else "as it was"
                print(json.dumps(row) if arguments.json else table(row), flush=True)


def run_decoder(
    decoder: str, folder: Path, executables: Path | None, environment: dict[str, str]
) -> dict[str, Any]:
    """Runs stage 3 on the latents in `folder`; reads the table that it prints at the end."""
    video = folder / f"{decoder}.mp4"
    arguments = ["--input_dir", folder, "--output_video", video, "--no_metadata"]
    arguments += ["--executables", executables] if executables else []
    started = time.time()
    subprocess.run(
        [sys.executable, ROOT / DECODER_SCRIPTS[decoder], *arguments],
        check=True,
        env=environment,
        stdout=sys.stderr,
    )
    process_seconds = time.time() - started
    report = json.loads(video.with_name(f"{video.stem}_timings.json").read_text())
    saving = report["at_once"]["run and save"]["saving"]  # counted from the first frames on
    return {
        "decoder": decoder,
        "seconds_to_first_frames": round(process_seconds - saving, 2),
        "process_seconds": round(process_seconds, 2),
        **report,
        "video": hashlib.sha256(video.read_bytes()).hexdigest()[:16],
    }


def compile_ahead(
    model: Path, arguments: argparse.Namespace, folder: Path, environment: dict[str, str]
) -> None:
    """Makes the executables of stage 2 and of the decoders once."""
    if folder.exists():
        return
    ahead = ["--model_id", model, "--sizes", arguments.size, "--allow_unsupported"]
    programs = [["--stages", "2"]]
    programs += [["--stages", "3", "--decoder", decoder] for decoder in arguments.decoders]
    for options in programs:
        subprocess.run(
            [sys.executable, ROOT / "compile_ahead.py", *ahead, *options, "--executables", folder],
            check=True,
            env=environment,
            stdout=sys.stderr,
        )


def write_embeddings(model: Path, folder: Path) -> None:
    """Writes stage 1's files with random embeddings."""
    import numpy as np

    from stages import files as stage_files
    from stages import sections

    config = json.loads((model / "transformer/config.json").read_text())
    shape = (1, config["max_text_seq_length"], config["text_embed_dim"])
    rng = np.random.default_rng(0)
    names = ("prompt_embeds", "negative_prompt_embeds")
    tensors = {name: rng.standard_normal(shape, np.float32) for name in names}
    stage = "stage1_text_encoder"
    section = sections.make_section(
        {
            **{"model_id": str(model), "revision": None, "model": {}, "dtype": "bfloat16"},
            **{"prompt": "noise", "negative_prompt": "", "max_sequence_length": shape[1]},
        }
    )
    stage_files.write_stage_file(folder / stage_files.EMBEDDINGS_FILE, stage, tensors, section)
    stage_files.record_section(folder, stage, section, inherited=folder)


class FirstStep(Exception):
    """Raised where the first step would begin."""


def run_stage(stage_arguments: list[str], *, steps: bool) -> None:
    """Runs stage 2 and times its phases; prints JSON as its last line."""
    started = time.time() - _process_age()
    stamps = [("interpreter", time.time())]

    def stamp(name: str) -> None:
        stamps.append((name, time.time()))

    import stage2_transformer as stage2
    from runtime.compilation import CompilationLog
    from runtime.progress import Timings
    from stages import denoise as stage

    check, denoise, result = stage.check, stage.denoise, {}
    log = CompilationLog()

    def stamped_check(*args: Any, **kwargs: Any) -> Any:
        stamp("arguments and stage file")
        plan = check(*args, **kwargs)
        stamp("imports, devices, checks")
        return plan

    def stamped_denoise(plan: Any, loaded: Any, *args: Any, **kwargs: Any) -> Any:
        stamp("wait for compiler or executable")
        calls = []

        def stamped_step(*step_args: Any) -> Any:
            if not calls:
                stamp("noise and positions")
                if not steps:
                    raise FirstStep
            calls.append(time.time())
            return step(*step_args)

        (whole,) = loaded
        step = whole.steps["off"]
        loaded = [dataclasses.replace(whole, steps={"off": stamped_step})]
        latents = denoise(plan, loaded, *args, **kwargs)
        result["steps"] = [round(b - a, 3) for a, b in itertools.pairwise([*calls, time.time()])]
        return latents

    class StampedTimings(Timings):
        def add(self, name: str, seconds: float) -> None:
            super().add(name, seconds)
            if name == "load":
                stamp("weights and prompts")

    stage.check, stage.denoise, stage.Timings = stamped_check, stamped_denoise, StampedTimings
    with contextlib.suppress(FirstStep):
        stage2.run(stage2.parse_arguments(stage_arguments))

    import jax

    before, seconds = started, {}
    for name, at in stamps:
        seconds[name] = round(at - before, 3)
        before = at
    print(
        json.dumps(
            {
                "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
                "seconds_to_first_step": round(before - started, 2),
                "seconds": seconds,
                "compilations": log.summary(),
                "step_seconds": result.get("steps"),
            }
        )
    )


def table(row: dict[str, Any]) -> str:
    parts = "".join(f"  {name:<34}{value:>8.2f} s\n" for name, value in row["seconds"].items())
    if "decoder" in row:
        what, seconds = f"frames, {row['decoder']}", row["seconds_to_first_frames"]
    else:
        what, seconds = "step", row["seconds_to_first_step"]
    return f"{row['run']}: {seconds} s to the first {what}\n{parts}"


def _process_age() -> float:
    """Returns the seconds since this process started."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _digest(folder: Path) -> str:
    """Hashes the latents' bytes, without the header of their file."""
    from cogvideox.model.folder import stored_tensors

    return hashlib.sha256(stored_tensors(folder)["latents"].read().tobytes()).hexdigest()[:16]


if __name__ == "__main__":
    main()
