"""Image-to-video and video-to-video against diffusers' pipelines, in float32, on several meshes.

The stages run in this process. Tolerances are those of `test_pipeline`: 1e-4 of the reference's
deviation and 90 dB.
"""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils import load_image
from PIL import Image
from safetensors.numpy import load_file

import stage1_text_encoder as stage1
import stage2_transformer as stage2
import stage3_vae_decoder as stage3
import stage3_vae_decoder_flax as stage3_flax
from tests.parity.test_pipeline import psnr, relative_error
from tests.tiny_models import save_tiny_model

PROMPT = "A red cat runs"
# A VAE of three levels, 4 pixels a latent, compiles faster than one of four.
SMALL = {"num_attention_heads": 4, "block_out_channels": (8, 8, 16)}
SCHEDULERS = {
    "dpm": diffusers.CogVideoXDPMScheduler,
    "ddim": diffusers.CogVideoXDDIMScheduler,
}


def picture(path: Path, mode: str, size: tuple[int, int], turned: bool = False) -> Path:
    """A picture of noise; `turned` has an EXIF tag that turns it by 90 degrees."""
    random = np.random.default_rng(3)
    pixels = random.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    exif = Image.Exif()
    if turned:
        exif[0x0112] = 6
    Image.fromarray(pixels, "RGBA").convert(mode).save(path, exif=exif)
    return path


def reference(
    model: Path, condition: dict[str, Any], scheduler: str, settings: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """diffusers' latents [C, T, H, W], padding dropped, and frames [F, height, width, 3]."""
    kind = diffusers.CogVideoXImageToVideoPipeline
    if "video" in condition:
        kind = diffusers.CogVideoXVideoToVideoPipeline
    pipeline = kind.from_pretrained(model)
    pipeline.scheduler = SCHEDULERS[scheduler].from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    seen = []
    with torch.no_grad():
        decode = pipeline.decode_latents
        pipeline.decode_latents = lambda latents: decode(seen.append(latents) or latents)
        frames = pipeline(
            prompt=PROMPT,
            negative_prompt="blue",
            generator=torch.Generator().manual_seed(5),
            output_type="np",
            max_sequence_length=16,
            **condition,
            **settings,
        ).frames[0]
    return seen[0][0].permute(1, 0, 2, 3).numpy(), frames


def run_stages(
    folder: Path, model: Path, given: list[object], settings: list[str], mesh: str
) -> np.ndarray:
    """Runs stages 1 and 2; returns the latents."""
    first = ["--prompt", PROMPT, "--negative_prompt", "blue", "--model_id", model, *given]
    first += ["--output_dir", folder, "--dtype=float32", "--allow_unsupported"]
    stage1.run(stage1.parse_arguments(list(map(str, first))))
    axes = [f"--{axis}={size}" for axis, size in zip(("dp", "sp", "tp"), mesh, strict=True)]
    second = ["--input_dir", folder, "--dtype=float32", "--seed=5", "--allow_unsupported"]
    stage2.run(stage2.parse_arguments([*map(str, second), *settings, *axes]))
    return load_file(folder / "stage2_latents.safetensors")["latents"][0]


# 1.5: `ofs`, 3 latent frames padded to 4, portrait, odd numbers of patches, RGBA, latents divided
# by the factor. The large sample size is for diffusers, which cuts positions of higher grids out of
# a table. 1.0: learned positions, a turned grey picture.
IMAGES = {
    "1.5": (
        {"generation": "1.5", "invert_scale_latents": True, "sample_height": 20},
        ("picture.png", "RGBA", (50, 70), False),
        {"height": 40, "width": 24, "num_frames": 9, "use_dynamic_cfg": True},
        *("dpm", "222"),
    ),
    "1.0": (
        {"generation": "1.0-rope", "sample_height": 4, "sample_width": 6, "sample_frames": 9},
        ("picture.jpg", "L", (40, 30), True),
        {"height": 16, "width": 24, "num_frames": 9, "use_dynamic_cfg": False},
        *("ddim", "141"),
    ),
}


@pytest.mark.parametrize("case", IMAGES)
def test_image_to_video_equals_diffusers(case: str, tmp_path: Path):
    config, made, size, scheduler, mesh = IMAGES[case]
    model = save_tiny_model(tmp_path / "model", image_to_video=True, **SMALL, **config)
    path = picture(tmp_path / made[0], *made[1:])
    settings = {"num_inference_steps": 4, "guidance_scale": 5.0, **size}
    latents, frames = reference(model, {"image": load_image(str(path))}, scheduler, settings)
    given = ["--image", path, "--height", size["height"], "--width", size["width"]]
    options = [f"--num_frames={size['num_frames']}", "--steps=4", "--guidance_scale=5"]
    options += [f"--scheduler={scheduler}", *["--use_dynamic_cfg"] * size["use_dynamic_cfg"]]
    ours = run_stages(tmp_path / "out", model, given, options, mesh)
    assert relative_error(ours, latents) < 1e-4
    for stage in (stage3, stage3_flax) if case == "1.5" else ():
        video = tmp_path / "video.npy"
        arguments = ["--input_dir", tmp_path / "out", "--dtype=float32", "--output_video", video]
        stage.run(stage.parse_arguments(list(map(str, arguments))))
        assert psnr(np.load(video), frames) > 90
    preview = Image.open(tmp_path / "out/stage1_input.png")
    assert preview.size == (size["width"], size["height"])


# 1.5: strength 0.58 of 5 steps runs 2; 13 frames make 4 latent frames, which make 16 frames; the
# latents are multiplied by the factor although the VAE says to divide. 2b: sincos positions, an odd
# number of latent frames; strength 1 starts from noise that is drawn after the posterior's sample.
VIDEOS = {
    "1.5": ({"generation": "1.5", "invert_scale_latents": True}, 13, "dpm", 5, 0.58, True, "222"),
    "2b": (
        {"generation": "1.0-sincos", "sample_height": 6, "sample_width": 10, "sample_frames": 9},
        *(9, "ddim", 2, 1.0, False, "114"),
    ),
}


@pytest.mark.parametrize("case", VIDEOS)
def test_video_to_video_equals_diffusers(case: str, tmp_path: Path):
    config, length, scheduler, steps, strength, dynamic, mesh = VIDEOS[case]
    model = save_tiny_model(tmp_path / "model", **SMALL, **config)
    random = np.random.default_rng(4)
    frames = random.random((length, 20, 30, 3))
    np.save(tmp_path / "video.npy", frames)
    pictures = [
        Image.fromarray((frame.astype(np.float32) * 255).round().astype(np.uint8))
        for frame in frames
    ]
    settings = {"height": 24, "width": 40, "guidance_scale": 5.0, "num_inference_steps": steps}
    settings |= {"strength": strength, "use_dynamic_cfg": dynamic}
    latents, _ = reference(model, {"video": pictures}, scheduler, settings)
    given = ["--video", tmp_path / "video.npy", "--height", 24, "--width", 40]
    given += ["--encoder=flax", "--encode_on=cpu"]
    options = [f"--steps={steps}", "--guidance_scale=5", f"--strength={strength}"]
    options += [f"--scheduler={scheduler}", *["--use_dynamic_cfg"] * dynamic]
    ours = run_stages(tmp_path / "out", model, given, options, mesh)
    assert relative_error(ours, latents) < 1e-4
