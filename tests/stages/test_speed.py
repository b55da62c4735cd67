"""Lossy options of stage 2: what they resolve to, what is refused, what is recorded."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import stage1_text_encoder as stage1
import stage2_transformer as stage2
import stage3_vae_decoder as stage3
from cogvideox.denoising import calibration as calibrations
from cogvideox.denoising import loop_checkpoint
from cogvideox.denoising.step_mask import budget_of, default_mask
from cogvideox.model.folder import ModelFolder, find_model
from cogvideox.model.settings import DenoisingSettings
from cogvideox.transformer.backends import HopperBackend
from cogvideox.transformer.precision import Precision
from cogvideox.video import contact_sheet
from stages import files as stage_files
from stages import speed
from stages.sections import DENOISE, fingerprint
from stages.speed import Lossy, read_lossy, resolve
from stages.steps import denoisers_of
from tests.tiny_models import save_tiny_model

STEPS = 7
MASK = "1101001"


@dataclasses.dataclass(frozen=True)
class Options:
    speed: str = "exact"
    step_mask: str | None = None
    mask_steps: int | None = None
    guidance_until: float | None = None
    sparse_attention: str | None = None
    dense_steps: int | None = None
    dense_layers: int | None = None
    attention_precision: str | None = None


def settings(steps: int = 50, guidance_scale: float = 6.0) -> DenoisingSettings:
    return DenoisingSettings(48, 80, 9, 16, steps, guidance_scale, False, "dpm", 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ModelFolder:
    return find_model(str(save_tiny_model(tmp_path_factory.mktemp("model"))), [])


@pytest.fixture
def mask_file(tmp_path) -> Path:
    path = tmp_path / "mask.json"
    path.write_text(json.dumps({"steps": MASK}))
    return path


@pytest.mark.parametrize(
    ("options", "computed", "guided"),
    [
        (Options(), 50, None),
        (Options("near"), 29, None),
        (Options("fast"), 24, None),
        (Options("turbo"), 20, 25),
        (Options("turbo", guidance_until=1.0), 20, None),
        (Options("turbo", step_mask="none"), 50, 25),
        (Options("near", step_mask="fast"), 24, None),
        (Options("fast", mask_steps=10), 10, None),
        (Options(guidance_until=0.31), 50, 16),
        (Options("near", mask_steps=50), 50, None),
    ],
)
def test_options_set_by_hand_replace_those_of_speed(options, computed, guided, model):
    lossy = resolve(options, settings(), model)
    assert (lossy.mask.budget if lossy.mask else 50) == computed
    assert lossy.guided_steps == guided
    assert (lossy.describe() == "exact") == (computed == 50 and guided is None)
    if lossy.mask:
        assert "not calibrated for this model" in lossy.describe()
        assert lossy.mask.computed == default_mask(50, computed)


@pytest.mark.parametrize("steps", [1, 2, 3, 25, 50])
@pytest.mark.parametrize("name", speed.SPEEDS)
def test_every_speed_fits_any_number_of_steps(steps, name, model):
    for guidance in (1.0, 6.0):
        lossy = resolve(Options(name), settings(steps, guidance), model)
        assert read_lossy(json.loads(json.dumps(lossy.to_json()))) == lossy
        if lossy.mask:
            assert {len(scales) for scales in lossy.mask.scales} == {1 + (guidance > 1)}
        if name in ("near", "fast"):
            assert (lossy.mask.budget if lossy.mask else steps) == budget_of(name, steps)


def test_the_cost_of_lossy_runs_is_counted_in_exact_steps(model):
    mask = resolve(Options("near"), settings(), model).mask
    assert Lossy().computed_steps(50) == 50
    assert Lossy(mask).computed_steps(50) == 29
    assert Lossy(None, 25).computed_steps(50) == 37.5
    early = sum(mask.computed[:25])
    assert Lossy(mask, 25).computed_steps(50) == early + (29 - early) / 2


def test_precision_is_recorded_and_decides_programs(model):
    lossy = resolve(Options(attention_precision="int8_qk"), settings(), model)
    assert lossy.describe() == "lossy: --attention_precision int8_qk"
    assert lossy.to_json() == {"attention_precision": "int8_qk"}
    assert read_lossy(lossy.to_json()) == lossy
    assert lossy.decides_programs(50) != Lossy().decides_programs(50)
    by_hand = resolve(Options("turbo", attention_precision="int8_qk"), settings(), model)
    assert by_hand.precision == Precision("int8_qk") and by_hand.guided_steps
    with pytest.raises(ValueError, match="attention_precision is 'int4'"):
        read_lossy({"attention_precision": "int4"})


def test_precision_is_refused_where_there_is_no_kernel():
    class Gpu:
        backend = HopperBackend()

    said = "--attention_precision int8_qk needs a TPU, or --attention reference.*splash.* has bf16"
    with pytest.raises(ValueError, match=said):
        denoisers_of(Gpu, Lossy(precision=Precision("int8_qk")), 50)


def test_a_mask_of_a_file(model, mask_file):
    lossy = resolve(Options(step_mask=str(mask_file)), settings(STEPS), model)
    assert lossy.mask.text == MASK and set(sum(lossy.mask.scales, ())) == {1.0}
    mask_file.write_text('{"steps": "1111111"}')
    assert resolve(Options(step_mask=str(mask_file)), settings(STEPS), model) == Lossy()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"steps": "0111111"}', "skips the first step"),
        ('{"steps": "0000000"}', "computes none of 7 steps"),
        ('{"steps": "11011"}', "is for 5 steps, this run has 7"),
        ('{"steps": "11x1011"}', "is not a row of digits 0 and 1"),
        ('{"steps": ""}', "is not a row of digits"),
        ('{"steps": 1101}', "is not a mask such as"),
        ('{"steps": "1101001", "scale": 2}', "is not a mask such as"),
        ('{"steps": "1101001"', "is not valid JSON"),
        ("[1, 1, 0]", "holds no JSON object"),
    ],
)
def test_bad_mask_files_are_refused(content, said, model, mask_file):
    mask_file.write_text(content)
    with pytest.raises(ValueError, match=said) as refused:
        resolve(Options(step_mask=str(mask_file)), settings(STEPS), model)
    assert "mask.json" in str(refused.value)


@pytest.mark.parametrize(
    ("options", "guidance", "said"),
    [
        (Options(mask_steps=5), 6.0, "--mask_steps is for --step_mask"),
        (Options("near", "none", mask_steps=5), 6.0, "--mask_steps is for --step_mask"),
        (Options("near", mask_steps=8), 6.0, "--mask_steps 8 is more than the 7 steps"),
        (Options(guidance_until=0.5), 1.0, "--guidance_until 0.5: this run has no guidance"),
        (Options(guidance_until=0.0), 6.0, "--guidance_until 0: at least one step"),
        (Options(step_mask="nowhere.json"), 6.0, "nowhere.json is neither none"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, guidance, said, model):
    with pytest.raises(ValueError, match=said):
        resolve(options, settings(STEPS, guidance), model)


def test_a_file_that_says_which_steps_takes_no_number(model, mask_file):
    with pytest.raises(ValueError, match="--mask_steps 3: .*says which steps"):
        resolve(Options(step_mask=str(mask_file), mask_steps=3), settings(STEPS), model)


@pytest.mark.parametrize(
    "value",
    [
        *("near", None, 3, [], {"mask": 1}, {"guided_steps": 0}, {"guided_steps": True}),
        *({"step_mask": "1101"}, {"step_mask": {"steps": "1101"}}),
        {"step_mask": {"steps": "11", "scales": [[1.0]], "calibrated": False}},
        {"step_mask": {"steps": "01", "scales": [[1.0], [1.0]], "calibrated": False}},
        {"step_mask": {"steps": "10", "scales": [[1.0], [math.nan]], "calibrated": False}},
        {"step_mask": {"steps": "10", "scales": [[1.0], "x"], "calibrated": False}},
    ],
)
def test_damaged_records_are_refused(value):
    with pytest.raises(ValueError, match="speed is .*, not what stage 2 writes"):
        read_lossy(value)


# Runs of stage 2 ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model) -> Path:
    """Makes embeddings of a prompt."""
    folder = tmp_path_factory.mktemp("stages")
    where = ["--model_id", str(model.path), "--output_dir", str(folder), "--dtype=float32"]
    stage1.run(stage1.parse_arguments(["--prompt=A red cat", *where]))
    return folder


def run(folder: Path, output_dir: Path, *more: object) -> np.ndarray:
    """Runs stage 2 as a user does; returns its latents."""
    arguments = [f"--input_dir={folder}", f"--output_dir={output_dir}", "--dtype=float32"]
    arguments += [f"--num_inference_steps={STEPS}", "--seed=3", *map(str, more)]
    stage2.run(stage2.parse_arguments(arguments))
    return load_file(output_dir / stage_files.LATENTS_FILE)["latents"]


def section(folder: Path) -> dict:
    return json.loads((folder / stage_files.CONFIG_FILE).read_text())[DENOISE]


def test_what_is_printed_and_recorded(folder, tmp_path, mask_file, capsys):
    exact = run(folder, tmp_path / "exact")
    assert "\nexact\n" in capsys.readouterr().out
    assert section(tmp_path / "exact")["speed"] == "exact"
    options = ("--step_mask", mask_file, "--guidance_until", 0.5)
    lossy = run(folder, tmp_path / "lossy", *options)
    said = capsys.readouterr().out
    line = (
        "lossy: step mask (4 of 7 steps computed, not calibrated for this model); guidance reused "
        "after step 4"
    )
    assert line in said
    recorded = section(tmp_path / "lossy")
    assert (
        recorded["speed"]["step_mask"]["steps"] == MASK and recorded["speed"]["guided_steps"] == 4
    )
    assert recorded["fingerprint"] != section(tmp_path / "exact")["fingerprint"]
    error = np.sqrt(np.square(lossy - exact).mean()) / exact.std()
    assert 1e-4 < error < 1
    # The same fingerprint as before there were lossy options, which was made of the other settings.
    whole = section(tmp_path / "exact")
    assert fingerprint({k: v for k, v in whole.items() if k != "speed"}) == whole["fingerprint"]

    captions = []
    write = contact_sheet.write_contact_sheet
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            contact_sheet, "write_contact_sheet",
            lambda *a, **k: (captions.append(k["caption"]), write(*a, **k)),
        )  # fmt: skip
        for name in ("exact", "lossy"):
            stage3.run(
                stage3.parse_arguments([f"--input_dir={tmp_path / name}", "--dtype=float32"])
            )
    assert line not in captions[0] and captions[1].endswith(line)


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "options",
    [
        ("--step_mask", "MASK", "--scheduler=dpm"),
        ("--step_mask", "MASK", "--guidance_until=0.4", "--scheduler=dpm"),
        ("--guidance_until=0.4", "--scheduler=ddim", "--use_dynamic_cfg"),
        ("--step_mask", "MASK", "--guidance_until=0.4", "--sparse_attention=fast"),
    ],
)
def test_killed_after_any_step(options, folder, tmp_path, mask_file, monkeypatch, capsys):
    """Kills the run after every checkpoint, so that each step starts from a checkpoint."""
    options = [str(mask_file) if option == "MASK" else option for option in options]
    whole = run(folder, tmp_path / "whole", *options)
    write, held = loop_checkpoint.write_checkpoint, []

    def write_and_die(path, checkpoint, *arguments):
        held.append(checkpoint.tensors.keys() - {"latents", "previous_x0"})
        write(path, checkpoint, *arguments)
        raise Killed

    monkeypatch.setattr(loop_checkpoint, "write_checkpoint", write_and_die)
    for done in range(1, STEPS):
        with pytest.raises(Killed):
            run(folder, tmp_path / "parts", *options, "--checkpoint_every=1")
        said = capsys.readouterr().out
        assert (f"{done - 1} of {STEPS} steps done" in said) == (done > 1), said
    parts = run(folder, tmp_path / "parts", *options, "--checkpoint_every=1")
    assert parts.tobytes() == whole.tobytes()
    masked, gated = "--step_mask" in options, "--guidance_until=0.4" in options
    for steps, names in enumerate(held, 1):
        needs = {"residual"} if masked and MASK[steps] == "0" else set()
        assert names == needs | ({"difference"} if gated and steps >= 3 else set())


def test_another_mask_seed_and_prompt_compile_nothing(folder, tmp_path, mask_file, capsys):
    run(folder, tmp_path, "--step_mask", mask_file)
    capsys.readouterr()
    mask_file.write_text('{"steps": "1011010"}')
    run(folder, tmp_path, "--step_mask", mask_file, "--seed=5", "--scheduler=ddim")
    assert "0 compilations" in capsys.readouterr().out
    run(folder, tmp_path)
    capsys.readouterr()
    run(folder, tmp_path, "--speed=near", "--mask_steps=7")  # all steps: the exact program
    assert "0 compilations" in capsys.readouterr().out


# Calibrations -------------------------------------------------------------------------------------


@pytest.fixture
def calibration_file(model, tmp_path) -> Path:
    target = speed.calibration_target(settings(25), model)
    rng = np.random.default_rng(0)
    ratios = tuple((1 - 0.01 * i, 1 - 0.02 * i) for i in range(25))
    weights = {edge: float(rng.uniform()) for edge in calibrations.edges(25)}
    made = calibrations.Calibration(target, ("a cat",), ratios, weights, {}, 1.0, {})
    calibrations.write_calibration(tmp_path / "calibration.json", made)
    return tmp_path / "calibration.json"


@pytest.mark.parametrize(
    ("options", "computed"),
    [({}, 15), ({"speed": "fast"}, 12), ({"speed": "turbo"}, 10), ({"mask_steps": 20}, 20)],
)
def test_a_calibration_takes_the_number_of_steps_of_speed(
    options, computed, model, calibration_file
):
    lossy = resolve(Options(step_mask=str(calibration_file), **options), settings(25), model)
    assert lossy.mask.budget == computed and lossy.calibrated
    assert "not calibrated" not in lossy.describe()
    assert read_lossy(lossy.to_json()) == lossy
    skipped = lossy.mask.computed.index(False)
    assert lossy.mask.scales[skipped] == (1 - 0.01 * skipped, 1 - 0.02 * skipped)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"height": 96}, "size 48x80x9, this run's size is 96x80x9"),
        ({"num_inference_steps": 24}, "steps 25, this run's steps is 24"),
        ({"scheduler": "ddim"}, "scheduler dpm, this run's scheduler is ddim"),
        ({"guidance_scale": 1.0}, "guidance on, this run's guidance is off"),
    ],
)
def test_a_calibration_for_another_run_is_refused(change, said, model, calibration_file):
    run_settings = dataclasses.replace(settings(25), **change)
    with pytest.raises(ValueError, match=said):
        resolve(Options(step_mask=str(calibration_file)), run_settings, model)


def test_a_calibration_of_another_model_is_refused(calibration_file, tmp_path):
    other = find_model(str(save_tiny_model(tmp_path / "other", num_layers=1)), [])
    with pytest.raises(ValueError, match="was calibrated for the model .*, this run's is .*other"):
        resolve(Options(step_mask=str(calibration_file)), settings(25), other)
