"""Calibrations: the weights of edges, the masks, the file, and runs that they are not for."""

import dataclasses
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from cogvideox.denoising import calibration as calibrations
from cogvideox.denoising import step_mask
from cogvideox.denoising.calibration import Calibration, CalibrationTarget
from runtime.errors import InputError

STEPS = 25
TARGET = CalibrationTarget(
    model_id="models/toyworld",
    model={"transformer": "0123456789abcdef", "scheduler": "fedcba9876543210"},
    height=96,
    width=160,
    num_frames=17,
    num_inference_steps=STEPS,
    scheduler="dpm",
    guidance_scale=2.0,
    use_dynamic_cfg=False,
)


def make_calibration(seed: int = 0) -> Calibration:
    rng = random.Random(seed)
    ratios = tuple((rng.uniform(0.8, 1), rng.uniform(0.8, 1)) for _ in range(STEPS))
    errors = {(i, j): rng.uniform(0, 1) * (j - i) for i, j in calibrations.edges(STEPS)}
    gains = {j: rng.uniform(0.01, 10) for j in range(6, STEPS)}
    weights = calibrations.weigh_edges(errors, gains, STEPS)
    masks = {b: calibrations.make_mask(weights, STEPS, b) for b in (15, 12)}
    return Calibration(TARGET, ("a red circle",), ratios, weights, masks, 12.5, {"device": "cpu"})


def test_edges_skip_only_late_steps_and_at_most_five():
    found = calibrations.edges(STEPS)
    assert min(found) == (4, 6) and max(j for _, j in found) == STEPS
    assert {j - i - 1 for i, j in found} == {1, 2, 3, 4, 5}
    assert len(found) == len(set(found)) == sum(min(5, STEPS - i - 1) for i in range(4, STEPS))
    assert calibrations.first_steps(50) == 10 and calibrations.first_steps(3) == 1


def test_weights_take_the_gain_of_the_edges_end():
    errors = {(0, 2): 3.0, (1, 4): 3.0, (3, 6): 3.0, (1, 3): 0.0}
    weights = calibrations.weigh_edges(errors, {2: 8.0, 3: 5.0, 4: 2.0}, 6)
    assert weights == {(0, 2): 24, (1, 4): 6, (3, 6): 3, (1, 3): 0}  # step 6 is the end


def test_masks_are_minimax_paths_with_the_root_of_their_weights():
    calibration = make_calibration()
    for budget in (8, 10, 15, 24, 25):
        mask = calibration.mask(budget)
        assert mask.computed == step_mask.minimax_mask(calibration.edge_weights, STEPS, budget)
        assert all(mask.computed[:5]) and sum(mask.computed) == budget
        nodes = [i for i in range(STEPS) if mask.computed[i]] + [STEPS]
        total = sum(calibration.edge_weights.get(e, 0) for e in itertools.pairwise(nodes))
        assert mask.predicted_error == pytest.approx(total**0.5)
        scaled = step_mask.scaled_mask(mask.computed, calibration.ratios)
        assert calibration.step_mask(budget) == scaled
    with pytest.raises(ValueError, match="the smallest number is 8"):
        calibration.mask(7)


def test_a_file_reads_back_equal(tmp_path: Path):
    calibration = make_calibration()
    path = tmp_path / "calibration.json"
    calibrations.write_calibration(path, calibration)
    assert calibrations.read_calibration(path) == calibration
    # A mask that was asked for is taken from the file.
    value = json.loads(path.read_text())
    value["masks"][0]["steps"] = "1" * 15 + "0" * 10
    path.write_text(json.dumps(value))
    assert calibrations.read_calibration(path).mask(15).computed == (True,) * 15 + (False,) * 10


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": "other"}, "format"),
        ({"version": 2}, "its version is 2, not 1"),
        ({"ratios": [[1.0, 1.0]]}, "25 steps and 2 branches"),
        ({"ratios": [[1.0]] * 25}, "25 steps and 2 branches"),
        ({"ratios": [[0.0, 1.0]] * 25}, "not positive"),
        ({"ratios": [1.0] * 25}, "ratios"),
        ({"edge_weights": [[1, 2]]}, "not an edge"),
        ({"edge_weights": [[1, 2, 0.5]]}, "not an edge"),
        ({"edge_weights": [[1.5, 4, 0.5]]}, "not an edge"),
        ({"edge_weights": [[1, 26, 0.5]]}, "not an edge"),
        ({"edge_weights": [[1, 4, -0.5]]}, "not an edge"),
        ({"masks": [{"computed": 3, "steps": "111", "predicted_error": 0.1}]}, "3 of 25"),
        ({"masks": [{"computed": 1, "steps": "0" * 25, "predicted_error": 0.1}]}, "none of 25"),
        ({"masks": [{"computed": 24, "steps": "0" + "1" * 24, "predicted_error": 0.1}]}, "first"),
        ({"masks": [{"computed": 24}]}, "no field"),
        ({"calibrated_for": {}}, "no field"),
        ({"seconds": "long"}, "seconds"),
        ({"more": 1}, "unknown field"),
    ],
)
def test_damaged_files_are_refused_in_one_line(
    tmp_path: Path, change: dict[str, Any], message: str
):
    path = tmp_path / "calibration.json"
    calibrations.write_calibration(path, make_calibration())
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message) as error:
        calibrations.read_calibration(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_malformed_json_is_refused(tmp_path: Path):
    path = tmp_path / "calibration.json"
    for text in ("", "[]", "{", '{"format": NaN}'):
        path.write_text(text)
        with pytest.raises(InputError):
            calibrations.read_calibration(path)
    with pytest.raises(InputError, match="cannot read"):
        calibrations.read_calibration(tmp_path / "missing.json")


@pytest.mark.parametrize(
    "change, both",
    [
        ({"model": {"transformer": "1" * 16}}, ("0123456789abcdef", "1" * 16)),
        ({"height": 128}, ("size 96x160x17", "128x160x17")),
        ({"num_frames": 33}, ("96x160x17", "96x160x33")),
        ({"num_inference_steps": 50}, ("steps 25", "50")),
        ({"scheduler": "ddim"}, ("scheduler dpm", "ddim")),
        ({"guidance_scale": 1.0}, ("guidance on", "off")),
    ],
)
def test_another_run_is_refused_with_both_named(change: dict[str, Any], both: tuple[str, str]):
    calibration = make_calibration()
    other = dataclasses.replace(TARGET, **change)
    with pytest.raises(ValueError) as error:
        calibration.check_matches(other, Path("calibration.json"))
    assert all(name in str(error.value) for name in both)


def test_the_same_model_elsewhere_and_another_guidance_scale_match():
    calibration = make_calibration()
    moved = dataclasses.replace(TARGET, model_id="/elsewhere", guidance_scale=7.0)
    calibration.check_matches(moved, Path("calibration.json"))
