"""calibrate.py --block_rules: the file it writes, and stage 2 with it.

A frame of the tiny model is one chunk. Of the named rules only `spatial` leaves anything out: the
first of 3 frames for the last, and the reverse.
"""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

import calibrate
import stage1_text_encoder as stage1
import stage2_transformer as stage2
from cogvideox.transformer.block_rules import Rule
from stages import calibrate_blocks
from stages import files as stage_files
from tests.tiny_models import save_tiny_model

STEPS = ["--num_inference_steps=3", "--dtype=float32", "--dp=1", "--sp=1", "--tp=1"]


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a model, embeddings and rules of any error, killed after the first prompt."""
    folder = tmp_path_factory.mktemp("made")
    model = save_tiny_model(folder / "model")
    where = ["--model_id", str(model), "--output_dir", str(folder)]
    stage1.run(stage1.parse_arguments(["--prompt=A red cat", *where, "--dtype=float32"]))
    (folder / "prompts.txt").write_text("A red cat\nA blue dog\n")
    options = ["--block_rules", "--block_alpha=1", f"--prompts={folder / 'prompts.txt'}"]
    save, saved = calibrate_blocks._Progress.save, []

    def save_and_die(self, errors, seconds):
        save(self, errors, seconds)
        saved.append(len(self.videos))
        if len(saved) == 1:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate_blocks._Progress, "save", save_and_die)
        for ends in (pytest.raises(Killed), contextlib.nullcontext()):
            with ends:
                calibrate.run(calibrate.parse_arguments([*options, *STEPS, *where]))
    assert saved == [1, 2]
    assert not (folder / calibrate_blocks.PROGRESS_FILE).exists()
    return folder


def test_the_sparsest_rule_within_alpha(made, tmp_path):
    rules = json.loads((made / "block_rules.json").read_text())
    assert rules["heads"] == [["spatial"] * 2] * 2
    errors = np.array(rules["errors"])
    assert errors.shape == (2, 2) and 1e-4 < errors.min() < 1
    # Text sees 4 chunks, frames 3, 4 and 3.
    assert rules["density"] == pytest.approx((4 + 3 + 4 + 3) / 16, abs=1e-4)
    where = ["--model_id", str(made / "model"), "--output_dir", str(tmp_path)]
    alpha = float(np.sort(errors.reshape(-1))[1:3].mean())  # between the errors of 4 heads
    options = ["--block_rules", f"--block_alpha={alpha}", *STEPS, *where]
    options.append(f"--prompts={made / 'prompts.txt'}")
    calibrate.run(calibrate.parse_arguments(options))
    some = json.loads((tmp_path / "block_rules.json").read_text())
    sparse = np.array(some["heads"]) == "spatial"
    assert sparse.tolist() == (errors <= alpha).tolist()
    # Of a run that was not killed, bit for bit.
    np.testing.assert_array_equal(np.array(some["errors"])[sparse], errors[sparse])
    assert max(map(max, some["errors"])) <= alpha


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "resuming from"),
        ({"fingerprint": "another"}, "it belongs to another calibration"),
        ({"rules": {"mine": [1]}}, "it belongs to another calibration"),
        ({"videos": [[[[0.1]]]]}, "it does not hold the errors of every head"),
        ({"videos": [[[["a"]]]]}, "ignoring"),
        ({"videos": [[[[0.1], [0.1, 0.2]]]]}, "ignoring"),
    ],
)
def test_what_a_calibration_resumes_from(change, said, tmp_path, capsys):
    choice = SimpleNamespace(rules={"mine": Rule((2,))}, shape=(1, 2, 1))
    path = tmp_path / "progress.json"
    made = {"fingerprint": "it", "rules": {"mine": [2]}, "seconds": 1.5, "videos": [[[[0.5], [2]]]]}
    path.write_text(json.dumps(made | change))
    found = calibrate_blocks._Progress(path, "it", choice)
    assert said in capsys.readouterr().out
    assert len(found.videos) == (not change)


def test_stage_2_takes_the_file(made, tmp_path, capsys):
    where = [f"--input_dir={made}", f"--output_dir={tmp_path}", "--dense_layers=0", *STEPS]
    rules = f"--sparse_attention={made / 'block_rules.json'}"
    latents = []
    for options in ([rules, "--dense_steps=1"], []):
        stage2.run(stage2.parse_arguments([*where[: 3 if options else 2], *where[3:], *options]))
        latents.append(load_file(tmp_path / stage_files.LATENTS_FILE)["latents"])
    said = capsys.readouterr()
    assert "sparse attention: 88% of the blocks" in said.out
    assert "cannot keep the executable" not in said.out + said.err
    assert 1e-4 < np.abs(latents[0] - latents[1]).max()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"height": 96}, "it was calibrated for 96x80x17, this run is of 64x80x17"),
        ({"model": {}}, "it was calibrated for another model"),
    ],
)
def test_rules_of_another_run_are_refused(changes, said, made, tmp_path):
    rules = json.loads((made / "block_rules.json").read_text())
    rules["calibrated_for"] |= changes
    (tmp_path / "rules.json").write_text(json.dumps(rules))
    options = [f"--input_dir={made}", f"--sparse_attention={tmp_path / 'rules.json'}", *STEPS]
    with pytest.raises(Exception, match=said):
        stage2.run(stage2.parse_arguments(options))
