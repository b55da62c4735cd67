"""benchmarks/ablation.py: its rows, and a whole run with another model than the small one."""

import json
import sys
from pathlib import Path

import pytest

from cogvideox.denoising.calibration import read_calibration
from tests.tiny_models import save_tiny_model

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
STEPS = 6


@pytest.fixture(scope="module")
def ablation(request):
    """The benchmark's module; benchmarks import each other by bare names."""
    sys.path.insert(0, str(BENCHMARKS))
    request.addfinalizer(lambda: sys.path.remove(str(BENCHMARKS)))
    import ablation

    return ablation


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), sample_height=16, sample_width=16)


@pytest.fixture(scope="module")
def calibration(model, tmp_path_factory) -> Path:
    import calibrate

    folder = tmp_path_factory.mktemp("calibration")
    where = ["--model_id", str(model), "--output_dir", str(folder), "--dtype=float32"]
    calibrate.run(calibrate.parse_arguments([*where, f"--num_inference_steps={STEPS}"]))
    return folder / "calibration.json"


def test_rows_begin_with_exact_and_repeat_none(ablation, calibration):
    rows = ablation.make_rows(calibration, (4, 3), STEPS)
    assert rows[0] == ablation.Row("exact", "exact", {})
    names = [name for name, _ in ablation.SWITCHES]
    assert [row.name for row in rows if row.group == "alone"] == names
    assert len({row.name for row in rows}) == len(rows)
    cumulative = [row for row in rows if row.group == "cumulative"]
    everything = {}
    for _, options in ablation.SWITCHES:
        everything |= options
    assert cumulative[-1].options.keys() >= everything.keys()
    of_four = [row.computed for row in rows if row.name.startswith("4 steps")]
    assert of_four[0] == read_calibration(calibration).mask(4).computed
    assert all(sum(computed) == 4 for computed in of_four)


def test_magcache_mask_has_the_budget(ablation):
    ratios = [(1 - 0.01 * (i % 7), 0.98) for i in range(25)]
    found = {budget: ablation.magcache_of(ratios, budget) for budget in range(1, 26)}
    masks = {budget: computed for budget, computed in found.items() if computed is not None}
    assert len(masks) > 5 and found[2] is None
    assert all(sum(computed) == budget for budget, computed in masks.items())


def test_run_writes_a_report_and_a_page(
    ablation, model, calibration, tmp_path, monkeypatch, capsys
):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A red cat\nA <b>blue</b> dog\n")
    command = ["ablation.py", "--model_id", str(model), "--prompts", str(prompts)]
    command += [f"--num_inference_steps={STEPS}", "--calibration", str(calibration)]
    command += ["--output_dir", str(tmp_path / "out"), "--masks=4"]
    monkeypatch.setattr(sys, "argv", command)
    ablation.main()
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "out/ablation.json").read_text())
    exact, *others = report["rows"]
    assert exact["lossless"] and exact["speed_up"] == 1 and "psnr" not in exact
    for row in others:
        if row["row"] == "sparse attention":
            assert row["blocks"] == 1  # a frame is one chunk
            continue
        assert not row["lossless"] and 0 < row["psnr_min"] <= row["psnr"] < 100
        assert 0 < row["ssim"] <= 1 and row["seconds_per_video"] > 0
    near = next(row for row in others if row["row"] == "near mask")
    assert near["computed_steps"] == 4 and near["mask"].count("1") == 4
    page = (tmp_path / "out/ablation.html").read_text()
    assert "&lt;b&gt;blue" in page and "pictures/00-1.png" in page
    assert (tmp_path / "out/pictures/00-1.png").exists()
    assert (tmp_path / "out/ablation.png").read_bytes().startswith(b"\x89PNG")


def test_estimates_add_up_the_steps_of_each_program(ablation, monkeypatch):
    known = {("off", 2): 1.0, ("keep", 2): 1.1, ("reuse", 2): 0.01, ("off", 1): 0.5}
    known |= {("keep", 1): 0.6, ("reuse", 1): 0.005}
    monkeypatch.setattr(
        ablation, "step_seconds", lambda denoiser, use: known[use, denoiser.branches]
    )
    rows = ablation.estimate(ablation.parse_arguments(["--topology", "v6e-8"]))
    seconds = {row["row"]: row["seconds_per_video"] for row in rows}
    assert seconds["exact"] == 50
    assert seconds["near mask"] == pytest.approx(29 * 1.1 + 21 * 0.01, abs=0.01)
    assert seconds["guidance reused from half on"] == pytest.approx(25 * 1 + 25 * 0.5)
    assert rows[-1]["computed_steps"] == 24 and rows[-1]["guided_steps"] == 25


def test_masks_need_a_calibration(ablation):
    with pytest.raises(SystemExit, match="--masks needs --calibration"):
        ablation.make_rows(None, (4,), STEPS)


def test_calibration_prompts_of_the_small_model_are_not_held_out():
    from stages.calibrate import read_prompts
    from toyworld.captions import held_out_captions

    texts = read_prompts(BENCHMARKS / "toyworld_prompts.txt")
    assert len(texts) == 16
    assert not set(texts) & {caption.text for caption in held_out_captions(1000)}
