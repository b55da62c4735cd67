"""Two processes with four devices each make the video of one process with one device, in float32.

The tolerances are rounding, as for the meshes of one process (test_meshes.py): what is seen is 7e-6
of the latents' standard deviation and 5e-6 of the frames' range.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import generate
import stage2_transformer as stage2
import stage3_vae_decoder as stage3
from runtime.exit_codes import run_script
from stages import files as stage_files
from tests.pairs import run_pair
from tests.tiny_models import save_tiny_model

SETTINGS = ["--dtype", "float32", "--allow_unsupported", "--num_frames", "9"]
SETTINGS += ["--num_inference_steps", "3", "--height", "48", "--width", "80"]
MESHES = {"dp2_tp4": ["--dp", "2", "--tp", "4"], "sp4_tp2": ["--dp", "1", "--sp", "4", "--tp", "2"]}
DECODERS = ("torchax", "flax")


def make_video(model: Path, folder: Path, *mesh: str) -> None:
    """The three stages, to latents and frames in `folder`."""
    arguments = ["--prompt", "A red cat", "--model_id", str(model), "--output_dir", str(folder)]
    arguments += ["--output_video", str(folder / "torchax.npy"), *SETTINGS, *mesh]
    generate.run(generate.parse_arguments(arguments))


def in_two_processes(model: Path, folder: Path) -> None:
    """Runs in each of them."""
    both = "--distributed"
    make_video(model, folder / "dp2_tp4", both, *MESHES["dp2_tp4"])
    arguments = ["--input_dir", str(folder / "dp2_tp4"), "--output_dir", str(folder / "sp4_tp2")]
    arguments += [both, *SETTINGS, *MESHES["sp4_tp2"], "--checkpoint_every", "2"]
    stage2.run(stage2.parse_arguments(arguments))
    arguments = ["--input_dir", str(folder / "dp2_tp4"), "--dtype", "float32", both]
    arguments += ["--output_video", str(folder / "dp2_tp4" / "flax.npy")]
    stage3.run(stage3.parse_arguments(arguments), "flax")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    model = save_tiny_model(folder / "model", num_attention_heads=8)
    pair = run_pair(*[["-m", "tests.parity.test_processes_parity", str(model), str(folder)]] * 2)
    for process in pair:
        assert process.returncode == 0, process.stderr
    assert "mesh" in pair[0].stdout and "denoising" in pair[0].stderr
    assert "mesh" not in pair[1].stdout and "denoising" not in pair[1].stderr
    make_video(model, folder / "one", "--dp", "1", "--sp", "1", "--tp", "1")
    return folder


@pytest.mark.parametrize("mesh", MESHES)
def test_latents_equal_those_of_one_process(mesh, folder):
    one, two = (
        load_file(folder / name / stage_files.LATENTS_FILE)["latents"] for name in ("one", mesh)
    )
    assert np.abs(one - two).max() / one.std() < 2e-5


@pytest.mark.parametrize("decoder", DECODERS)
def test_frames_equal_those_of_one_process(decoder, folder):
    one = np.load(folder / "one" / "torchax.npy")
    two = np.load(folder / "dp2_tp4" / f"{decoder}.npy")
    assert one.shape == two.shape == (9, 48, 80, 3)
    assert np.abs(one - two).max() < 2e-5


def test_the_second_process_leaves_no_file(folder):
    assert not list(folder.rglob("*.tmp")) and not list(folder.rglob("stage2_checkpoint*"))


if __name__ == "__main__":
    run_script(lambda: in_two_processes(*map(Path, sys.argv[1:])))
