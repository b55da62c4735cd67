"""A loop resumed from its checkpoint equals an uninterrupted one, bit for bit."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import stage1_text_encoder as stage1
import stage2_transformer as stage2
from cogvideox.denoising import loop, loop_checkpoint
from runtime.errors import Stopped
from runtime.tensor_files import write_tensors
from stages import files as stage_files
from tests.tiny_models import save_tiny_model

STEPS = 7
CHECKPOINTS = "stage2_checkpoint*"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Makes embeddings of a prompt, for a model with padded latent frames."""
    model, folder = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("stages")
    save_tiny_model(model)
    where = ["--model_id", str(model), "--output_dir", str(folder), "--dtype=float32"]
    stage1.run(stage1.parse_arguments(["--prompt=A red cat", *where]))
    return folder


class Killed(BaseException):
    pass


def run(folder: Path, output_dir: Path, scheduler: str, dtype: str, *more: str) -> np.ndarray:
    """Runs stage 2 as a user does; returns its latents."""
    settings = [f"--num_inference_steps={STEPS}", f"--scheduler={scheduler}", f"--dtype={dtype}"]
    where = [f"--input_dir={folder}", f"--output_dir={output_dir}"]
    stage2.run(stage2.parse_arguments([*where, *settings, "--seed=3", *more]))
    return load_file(output_dir / stage_files.LATENTS_FILE)["latents"]


@pytest.mark.parametrize(
    ("scheduler", "dtype"), [("dpm", "float32"), ("ddim", "float32"), ("dpm", "bfloat16")]
)
def test_killed_after_any_step(scheduler, dtype, folder, tmp_path, monkeypatch, capsys):
    """Kills the run after every checkpoint, so that each step starts from a checkpoint."""
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
    assert not list((tmp_path / "parts").glob(CHECKPOINTS))


def interrupt(folder: Path, output_dir: Path, monkeypatch, after: int, *more: str) -> Path:
    """Interrupts a run after this many steps; returns its checkpoint."""
    run_loop = loop.run_loop

    def interrupted(*arguments, **keywords):
        for state in run_loop(*arguments, **keywords):
            if state.steps > after:
                raise Stopped(signal.SIGINT)
            yield state

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(loop, "run_loop", interrupted)
        run(folder, output_dir, "ddim", "float32", *more)
    return max(output_dir.glob(CHECKPOINTS), key=os.path.getmtime, default=output_dir)


def test_an_interrupted_run_says_what_is_saved_and_how_to_go_on(
    folder, tmp_path, monkeypatch, capsys
):
    interrupt(folder, tmp_path, monkeypatch, 2, "--checkpoint_every=3")
    assert "nothing is saved yet: --checkpoint_every 3" in capsys.readouterr().out
    path = interrupt(folder, tmp_path, monkeypatch, 5, "--checkpoint_every=3")
    said = capsys.readouterr().out
    assert f"saved 3 of 7 steps in {path}; the same command resumes there" in said


def test_another_seed_keeps_the_checkpoint(folder, tmp_path, monkeypatch, capsys):
    whole = run(folder, tmp_path / "whole", "ddim", "float32")
    path = interrupt(folder, tmp_path, monkeypatch, 5, "--checkpoint_every=3")
    run(folder, tmp_path, "ddim", "float32", "--checkpoint_every=3", "--seed=4")
    assert list(tmp_path.glob(CHECKPOINTS)) == [path]
    capsys.readouterr()
    resumed = run(folder, tmp_path, "ddim", "float32", "--checkpoint_every=3")
    assert f"resuming from {path}, 3 of 7" in capsys.readouterr().out
    assert resumed.tobytes() == whole.tobytes()


def test_a_checkpoint_of_a_batch_made_before_names_had_the_run(
    folder, tmp_path, monkeypatch, capsys
):
    whole = run(folder, tmp_path / "whole", "ddim", "float32")
    path = interrupt(folder, tmp_path, monkeypatch, 5, "--checkpoint_every=3")
    old = path.rename(path.with_name(stage_files.OLD_CHECKPOINT_FILE))
    capsys.readouterr()
    resumed = run(folder, tmp_path, "ddim", "float32", "--checkpoint_every=3")
    assert f"resuming from {old}, 3 of 7" in capsys.readouterr().out
    assert resumed.tobytes() == whole.tobytes()
    assert not list(tmp_path.glob(CHECKPOINTS))


def test_damaged_checkpoints_are_ignored(folder, tmp_path, monkeypatch, capsys):
    path = interrupt(folder, tmp_path, monkeypatch, 5, "--checkpoint_every=3")
    path.write_bytes(b"no checkpoint")
    run(folder, tmp_path, "ddim", "float32", "--checkpoint_every=3")
    assert "ignoring checkpoint" in capsys.readouterr().out
    os.mkfifo(path)
    run(folder, tmp_path, "ddim", "float32", "--checkpoint_every=3")
    assert "is a named pipe" in capsys.readouterr().out
    state = np.zeros((1, 1), np.float32)
    loop_checkpoint.write_checkpoint(path, loop_checkpoint.LoopCheckpoint(2, state, state), "other")
    run(folder, tmp_path, "ddim", "float32", "--checkpoint_every=3")
    assert "it belongs to a different run" in capsys.readouterr().out


SHAPE = (1, 2, 3, 4, 5)
TYPES = {"latents": (SHAPE, "float32"), "previous_x0": (SHAPE, "float32")}


@pytest.mark.parametrize(
    ("steps", "change", "said"),
    [
        (2, {}, ""),
        (0, {}, "after 0 of 4 steps"),
        (4, {}, "after 4 of 4 steps"),
        (-1, {}, "after -1 of 4 steps"),
        ("\x1b[31m", {}, "invalid literal"),
        (2, {"latents": np.zeros(SHAPE, np.int16)}, "its tensors are"),
        (2, {"latents": np.zeros((1, 1), np.float32)}, "its tensors are"),
        (2, {"previous_x0": np.zeros(SHAPE, np.float64)}, "its tensors are"),
        (2, {"more": np.zeros(1, np.int8)}, "its tensors are"),
    ],
)
def test_odd_contents_of_the_right_fingerprint_are_ignored(steps, change, said, tmp_path, capsys):
    state = np.ones(SHAPE, np.float32)
    stamp = {"fingerprint": "this run", "steps": str(steps)}
    tensors = {"latents": state, "previous_x0": state} | change
    write_tensors(tmp_path / "checkpoint", tensors, stamp)
    read = loop_checkpoint.read_checkpoint(
        tmp_path / "checkpoint", "this run", total=4, tensor_types=lambda _: TYPES
    )
    output = capsys.readouterr().out
    assert (read is None) == bool(said) and said in output
    assert output.count("\n") == bool(said) and output.rstrip("\n").isprintable()


def test_a_flipped_bit_of_a_checkpoint_is_seen(tmp_path, capsys):
    state = np.ones(SHAPE, np.float32)
    path = tmp_path / "checkpoint"
    loop_checkpoint.write_checkpoint(path, loop_checkpoint.LoopCheckpoint(2, state, state), "run")
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    options = {"total": 4, "tensor_types": lambda _: TYPES}
    assert loop_checkpoint.read_checkpoint(path, "run", **options) is None
    assert "checksum does not match" in capsys.readouterr().out
