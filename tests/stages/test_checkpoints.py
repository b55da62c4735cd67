"""A loop that was stopped and goes on from its checkpoint equals the whole one, bit by bit."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import stage1_text_encoder as stage1
import stage2_transformer as stage2
from cogvideox.denoising import loop_checkpoint
from stages import files as stage_files
from tests.tiny_models import save_tiny_model

STEPS = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Embeddings of a prompt, of a model with padded latent frames."""
    model, folder = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("stages")
    save_tiny_model(model)
    where = ["--model_id", str(model), "--output_dir", str(folder), "--dtype=float32"]
    stage1.run(stage1.parse_arguments(["--prompt=A red cat", *where]))
    return folder


class Killed(BaseException):
    pass


def run(folder: Path, output_dir: Path, scheduler: str, dtype: str, *more: str) -> np.ndarray:
    """Stage 2 as a user runs it; its latents."""
    settings = [f"--num_inference_steps={STEPS}", f"--scheduler={scheduler}", f"--dtype={dtype}"]
    where = [f"--input_dir={folder}", f"--output_dir={output_dir}"]
    stage2.run(stage2.parse_arguments([*where, *settings, "--seed=3", *more]))
    return load_file(output_dir / stage_files.LATENTS_FILE)["latents"]


@pytest.mark.parametrize(
    ("scheduler", "dtype"), [("dpm", "float32"), ("ddim", "float32"), ("dpm", "bfloat16")]
)
def test_killed_after_any_step(scheduler, dtype, folder, tmp_path, monkeypatch, capsys):
    """Killed once after every checkpoint that it writes, so each step runs from a checkpoint."""
    whole = run(folder, tmp_path / "whole", scheduler, dtype)
    write = loop_checkpoint.write_checkpoint

    def write_and_die(*arguments):
        write(*arguments)
        raise Killed

    monkeypatch.setattr(loop_checkpoint, "write_checkpoint", write_and_die)
    for done in range(1, STEPS):
        with pytest.raises(Killed):
            run(folder, tmp_path / "parts", scheduler, dtype, "--checkpoint_every=1")
        said = capsys.readouterr().out
        assert ("resuming" in said) == (done > 1), said
    parts = run(folder, tmp_path / "parts", scheduler, dtype, "--checkpoint_every=1")
    assert parts.dtype == whole.dtype and parts.tobytes() == whole.tobytes()
    assert not (tmp_path / "parts" / stage_files.CHECKPOINT_FILE).exists()


def test_other_runs_and_damaged_checkpoints_are_not_gone_on_from(folder, tmp_path, capsys):
    tmp_path.joinpath(stage_files.CHECKPOINT_FILE).write_bytes(b"no checkpoint")
    run(folder, tmp_path, "ddim", "float32", "--checkpoint_every=3")
    assert "not going on" in capsys.readouterr().out
    state = np.zeros((1, 1), np.float32)
    checkpoint = loop_checkpoint.LoopCheckpoint(2, state, state)
    loop_checkpoint.write_checkpoint(
        tmp_path / stage_files.CHECKPOINT_FILE, checkpoint, "another run"
    )
    run(folder, tmp_path, "ddim", "float32", "--checkpoint_every=3")
    assert "another run" in capsys.readouterr().out
