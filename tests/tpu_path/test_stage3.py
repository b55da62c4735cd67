"""Stage 3 on the TPU path, interpreted, in bfloat16: as close to float32 as the CPU path.

Devices do not divide the 10 latent columns: of 4 the last one has a single column, of 6 it has
none. PSNR differs by a few tenths of a dB with where a path rounds; a wrong row, column
or frame costs tens.
"""

from pathlib import Path

import numpy as np
import pytest

from tests.parity.test_pipeline import PROMPT, psnr
from tests.tiny_models import save_tiny_model
from tests.tpu_path.runs import run_on_tpu_path, run_script

ROUNDING_DB = 0.5
SCRIPTS = {"stage3": "stage3_vae_decoder.py", "stage3_flax": "stage3_vae_decoder_flax.py"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Makes latents with stages 1 and 2 for a model whose VAE the Pallas kernels take."""
    folder = tmp_path_factory.mktemp("latents")
    model = save_tiny_model(folder / "model", num_layers=1, block_out_channels=(128, 128, 128, 256))
    run_script("stage1_text_encoder.py", "--prompt", PROMPT, "--model_id", model,
               "--dtype=float32", "--output_dir", folder)  # fmt: skip
    run_script("stage2_transformer.py", "--input_dir", folder, "--dtype=float32",
               "--height=32", "--width=80", "--num_frames=9",
               "--num_inference_steps=2", "--allow_unsupported")  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def cpu(folder: Path) -> tuple[np.ndarray, float]:
    """Returns the float32 video, and the PSNR of the CPU path's bfloat16 against it."""
    videos = []
    for dtype in ("float32", "bfloat16"):
        video = folder / f"{dtype}.npy"
        run_script(SCRIPTS["stage3_flax"], "--input_dir", folder, "--dtype", dtype,
                   "--output_video", video)  # fmt: skip
        videos.append(np.load(video).astype(np.float32))
    return videos[0], psnr(videos[1], videos[0])


@pytest.mark.parametrize(
    ("stage", "devices"), [("stage3_flax", 1), ("stage3", 4), ("stage3_flax", 6)]
)
def test_bfloat16_is_as_good_as_on_the_cpu_path(folder, cpu, stage, devices):
    exact, cpu_psnr = cpu
    video = folder / f"{stage}-{devices}.npy"
    run_on_tpu_path(stage, "--devices", devices, "--input_dir", folder, "--dtype=bfloat16",
                    "--output_video", video)  # fmt: skip
    ours = np.load(video).astype(np.float32)
    assert cpu_psnr - ROUNDING_DB <= psnr(ours, exact) < 90
