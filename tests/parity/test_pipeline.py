"""The scripts as a user runs them, against diffusers' pipeline on the same folder, in float32.

One case starts each script in a process of its own; the others call them here, which spares five
imports of torch and JAX a case.

Tolerances are the project's contract: latents within 2e-3 of the reference's standard deviation
and frames above 60 dB. What is seen is about 5e-6 and 120 dB; the tests hold to 1e-4 and 90 dB,
which leaves room for another summation order and none for a wrong step, token or frame.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import stage1_text_encoder
import stage2_transformer
import stage3_vae_decoder
from tests.tiny_models import save_tiny_model

ROOT = Path(__file__).parents[2]
PROMPT = "A red cat runs"


def run_script(name: str, *arguments: object, devices: int = 1) -> str:
    """Runs a stage script in a process of its own; returns what it printed."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, ROOT / name, *map(str, arguments)],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("device: CPU") == 1
    return done.stdout


def call_script(name: str, *arguments: object) -> None:
    """Runs a stage script in this process, on one of its devices."""
    script, axes, more = {
        "stage1_text_encoder.py": (stage1_text_encoder, (), ()),
        "stage2_transformer.py": (stage2_transformer, ("dp", "sp", "tp"), ()),
        "stage3_vae_decoder.py": (stage3_vae_decoder, ("dp", "tp"), ()),
        "stage3_vae_decoder_flax.py": (stage3_vae_decoder, ("dp", "tp"), ("flax",)),
    }[name]
    words = [*map(str, arguments), *(f"--{axis}=1" for axis in axes)]
    script.run(script.parse_arguments(words), *more)


def reference(model: Path, scheduler: str, seed: int, **settings) -> tuple[np.ndarray, np.ndarray]:
    """diffusers' latents [C, T, H, W], padding dropped, and frames [F, height, width, 3]."""
    pipeline = diffusers.CogVideoXPipeline.from_pretrained(model)
    classes = {
        "dpm": diffusers.CogVideoXDPMScheduler,
        "ddim": diffusers.CogVideoXDDIMScheduler,
    }
    pipeline.scheduler = classes[scheduler].from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    seen = []
    with torch.no_grad():
        vae_decode = pipeline.decode_latents
        pipeline.decode_latents = lambda latents: vae_decode(seen.append(latents) or latents)
        frames = pipeline(
            PROMPT, generator=torch.Generator().manual_seed(seed), output_type="np", **settings
        ).frames[0]
    return seen[0][0].permute(1, 0, 2, 3).numpy(), frames


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / theirs.std())


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    return float(-10 * np.log10(np.square(ours - theirs).mean() + 1e-20))


CASES = {
    # 1.5, latent frames padded from 3 to 4, an odd number of patches across, dynamic guidance.
    "1.5 dpm": (
        {"generation": "1.5", "attention_head_dim": 16},
        {"scheduler": "dpm", "steps": 6, "guidance": 6.0, "dynamic": True},
        {"height": 48, "width": 80, "num_frames": 9},
    ),
    # Heads of 64, an even number of latent frames (16 frames come out of 13), no guidance.
    "1.5 ddim": (
        {"generation": "1.5", "attention_head_dim": 64},
        {"scheduler": "ddim", "steps": 3, "guidance": 1.0, "dynamic": False},
        {"height": 64, "width": 48, "num_frames": 13},
    ),
    "1.0 sincos dpm": (
        {"generation": "1.0-sincos", "attention_head_dim": 32},
        {"scheduler": "dpm", "steps": 7, "guidance": 3.0, "dynamic": False},
        {"height": 64, "width": 80, "num_frames": 17},
    ),
    "1.0 rope ddim": (
        {"generation": "1.0-rope", "attention_head_dim": 16, "activation_fn": "geglu"},
        {"scheduler": "ddim", "steps": 5, "guidance": 6.0, "dynamic": True},
        {"height": 80, "width": 48, "num_frames": 9},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_scripts_equal_diffusers(case: str, tmp_path: Path):
    model_settings, run_settings, size = CASES[case]
    model = save_tiny_model(tmp_path / "model", **model_settings)
    guidance = {
        "num_inference_steps": run_settings["steps"],
        "guidance_scale": run_settings["guidance"],
    }
    latents, frames = reference(
        model,
        run_settings["scheduler"],
        seed=0,
        use_dynamic_cfg=run_settings["dynamic"],
        max_sequence_length=16,
        negative_prompt="blue",
        **guidance,
        **size,
    )

    run = run_script if case == "1.5 dpm" else call_script
    outputs = ("--output_dir", tmp_path / "out", "--dtype", "float32")
    texts = ("--prompt", PROMPT, "--negative_prompt", "blue", "--model_id", model)
    run("stage1_text_encoder.py", *texts, *outputs)
    settings = [f"--{name}={value}" for name, value in {**guidance, **size}.items()]
    settings += ["--use_dynamic_cfg"] * run_settings["dynamic"]
    settings += ["--scheduler", run_settings["scheduler"], "--seed=0", "--allow_unsupported"]
    run("stage2_transformer.py", "--input_dir", tmp_path / "out", *outputs, *settings)
    ours = load_file(tmp_path / "out/stage2_latents.safetensors")["latents"][0]
    assert relative_error(ours, latents) < 1e-4
    for script in ("stage3_vae_decoder.py", "stage3_vae_decoder_flax.py"):
        video = tmp_path / f"{script}.npy"
        run(script, "--input_dir", tmp_path / "out", "--dtype=float32", "--output_video", video)
        assert psnr(np.load(video), frames) > 90

    sections = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert sections["stage2_transformer"]["seed"] == 0
    assert sections["stage1_text_encoder"]["prompt"] == PROMPT


def test_other_prompt_seed_guidance_and_steps_compile_nothing(tmp_path: Path):
    model = save_tiny_model(tmp_path / "model")
    printed = []
    for prompt, settings in (
        ("A red cat", ["--seed=1", "--num_inference_steps=3", "--guidance_scale=6"]),
        ("A blue dog", ["--seed=2", "--num_inference_steps=4", "--guidance_scale=2.5",
                        "--use_dynamic_cfg", "--scheduler=ddim"]),
    ):  # fmt: skip
        folder = ("--output_dir", tmp_path / "out")
        run_script("stage1_text_encoder.py", "--prompt", prompt, "--model_id", model, *folder)
        printed.append(
            run_script("stage2_transformer.py", "--input_dir", tmp_path / "out", *settings)
        )
    assert "1 compilations, 0 cache hits" in printed[0]
    assert "0 compilations, 0 cache hits" in printed[1]
    report = json.loads((tmp_path / "out/stage2_timings.json").read_text())
    assert report["compilation"]["compilations"] == 0
