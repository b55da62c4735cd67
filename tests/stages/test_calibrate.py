"""calibrate.py on a tiny model: what it measures is what skipping costs; resume; bad input."""

import json
from pathlib import Path

import numpy as np
import pytest

import calibrate as script
from cogvideox.denoising import calibration as calibrations
from cogvideox.denoising import segment_errors
from cogvideox.denoising.loop import LoadedDenoiser, run_loop, to_host
from cogvideox.denoising.noise import NoiseSource
from cogvideox.denoising.segment_errors import Measurement, VideoErrors
from cogvideox.denoising.step_mask import scaled_mask
from cogvideox.model.folder import find_model
from runtime.exit_codes import run_main
from stages import calibrate, denoise
from tests.tiny_models import save_tiny_model

STEPS = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model with padded latent frames."""
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def measured(model) -> tuple[denoise.DenoisingRun, LoadedDenoiser, VideoErrors]:
    """One video's errors, and the run that they are of."""
    options = denoise.DenoiseOptions(
        input_dir=Path(),
        output_dir=Path(),
        dtype="float32",
        seed=3,
        num_inference_steps=STEPS,
        scheduler="dpm",
        use_dynamic_cfg=True,
    )
    checked = denoise.check(options, find_model(str(model), []), 1, 16)
    denoiser = checked.denoiser
    rng = np.random.default_rng(0)
    names = ("prompt_embeds", "negative_prompt_embeds")
    texts = {name: rng.normal(size=(1, 16, 32)).astype(np.float32) for name in names}
    loaded = LoadedDenoiser(
        denoiser,
        denoiser.compile(None, ("off", "keep", "reuse")),
        denoiser.load(),
        denoiser.prompt_embeds(texts),
    )
    steps = []
    measurement = Measurement(
        *(loaded, checked.schedule, 3, NoiseSource(), checked.padding_frames),
        lambda: steps.append(1),
    )
    results = list(measurement.run())
    assert len(steps) == segment_errors.exact_steps(STEPS)
    assert [len(video.final_errors) for video in results] == list(range(len(results)))
    return checked, loaded, results[-1]


def latents_of(checked, loaded, computed: list[bool] | None, ratios) -> np.ndarray:
    """The final latents of stage 2's own loop, without padding frames."""
    schedule = checked.schedule
    if computed is not None:
        mask = scaled_mask(computed, ratios)
        schedule = type(schedule)(**{**vars(schedule), "mask": mask})
    *_, state = run_loop([loaded], schedule, 3, NoiseSource())
    return to_host(state).latents[:, checked.padding_frames :]


def test_errors_are_those_of_masks_that_skip_one_segment(measured):
    checked, loaded, video = measured
    exact = latents_of(checked, loaded, None, None)
    edges = {segment_errors.probe_edge(j, STEPS): j for j in video.final_errors}
    assert edges
    to_the_end = {(i, j): None for i, j in video.errors if j == STEPS}
    for (i, j), probe in {**edges, **to_the_end}.items():
        computed = [not i < k < j for k in range(STEPS)]
        other = latents_of(checked, loaded, computed, video.ratios)
        expected = np.square(other - exact).mean() / exact.var()
        got = video.errors[i, j] if probe is None else video.final_errors[probe]
        assert got == pytest.approx(expected, rel=1e-3)


def test_ratios_are_means_over_video_tokens(measured):
    checked, loaded, video = measured
    layout = loaded.denoiser.layout
    states = run_loop([loaded], checked.schedule, 3, NoiseSource(), uses=["keep"] * STEPS)
    norms = [
        np.linalg.norm(np.asarray(state.reusable.residual)[:, layout.text : layout.tokens], axis=-1)
        for state in states
    ]
    assert video.ratios[0] == [1, 1] and len(video.ratios) == STEPS
    for k in range(1, STEPS):
        assert video.ratios[k] == pytest.approx((norms[k] / norms[k - 1]).mean(axis=1), rel=1e-5)


def test_every_edge_is_measured_and_two_videos_are_averaged(measured):
    _, _, video = measured
    assert video.errors.keys() == set(calibrations.edges(STEPS))
    assert list(video.final_errors) == segment_errors.probed_steps(STEPS)
    larger = {edge: 9 * error for edge, error in video.errors.items()}
    gone = dict.fromkeys(video.final_errors, 0.0)
    ratios, weights = segment_errors.mean_over_videos(
        [video, VideoErrors(video.ratios, larger, gone)], STEPS
    )
    assert ratios == video.ratios
    for edge, error in video.errors.items():
        if edge[1] == STEPS:  # roots of 1 and 9 errors have the mean 2
            assert weights[edge] == pytest.approx(4 * error)
        else:  # nothing is left of the second video's error
            final = video.final_errors[edge[1]]
            gain = final / video.errors[segment_errors.probe_edge(edge[1], STEPS)]
            assert weights[edge] == pytest.approx(error * gain / 4)


def arguments(model: Path, folder: Path, *more: str) -> list[str]:
    return [
        *("--model_id", str(model), "--output_dir", str(folder), "--dtype=float32"),
        *(f"--num_inference_steps={STEPS}", "--compute=5,7", *more),
    ]


def run(*arguments_: str) -> None:
    script.run(script.parse_arguments(list(arguments_)))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("# two\nA red cat\n\nA blue dog\n")
    return path


@pytest.fixture(scope="module")
def whole(model, prompts, tmp_path_factory) -> Path:
    """The folder of a finished calibration."""
    folder = tmp_path_factory.mktemp("whole")
    plot = str(folder / "masks.png")
    run(*arguments(model, folder, "--prompts", str(prompts), "--plot", plot))
    return folder


def numbers(folder: Path) -> dict[str, object]:
    """A calibration without what differs between two runs."""
    value = json.loads((folder / calibrate.CALIBRATION_FILE).read_text())
    return {name: value[name] for name in value.keys() - {"seconds"}}


def test_a_calibration_is_complete(whole, model):
    calibration = calibrations.read_calibration(whole / calibrate.CALIBRATION_FILE)
    assert calibration.prompts == ("A red cat", "A blue dog")
    assert sorted(calibration.masks) == [5, 7] and calibration.seconds > 0
    assert calibration.target.num_inference_steps == STEPS
    assert (whole / "masks.png").read_bytes().startswith(b"\x89PNG")
    assert not (whole / calibrate.PROGRESS_FILE).exists()
    assert calibration.step_mask(6).budget == 6


class Killed(BaseException):
    pass


def test_a_killed_calibration_resumes_to_the_same_numbers(
    whole, model, prompts, tmp_path, monkeypatch, capsys
):
    save, kills = calibrate._Progress.save, 0
    for after in (1, 3, 2, 4):
        saves = []

        def save_and_die(self, *held, saves=saves, after=after):
            save(self, *held)
            saves.append(held)
            if len(saves) == after:
                raise Killed

        monkeypatch.setattr(calibrate._Progress, "save", save_and_die)
        capsys.readouterr()
        with pytest.raises(Killed):
            run(*arguments(model, tmp_path, "--prompts", str(prompts)))
        assert ("resuming" in capsys.readouterr().out) == (kills > 0)
        kills += 1
    monkeypatch.setattr(calibrate._Progress, "save", save)
    run(*arguments(model, tmp_path, "--prompts", str(prompts)))
    assert "resuming" in capsys.readouterr().out
    assert numbers(tmp_path) == numbers(whole)


def test_progress_of_another_calibration_is_ignored(model, tmp_path, capsys):
    (tmp_path / calibrate.PROGRESS_FILE).write_text(
        json.dumps({"fingerprint": "other", "seconds": 1.0, "videos": []})
    )
    found = calibrate._Progress(tmp_path / calibrate.PROGRESS_FILE, "mine", STEPS)
    assert not found.videos and "belongs to another calibration" in capsys.readouterr().out
    (tmp_path / calibrate.PROGRESS_FILE).write_text('{"fingerprint": "mine", "videos": [{')
    assert not calibrate._Progress(tmp_path / calibrate.PROGRESS_FILE, "mine", STEPS).videos
    assert "ignoring" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        (["--compute=9"], "--compute 9: a mask of 8 steps"),
        (["--compute=1"], "the smallest number is 2"),
        (["--compute=0"], "out of range"),
        (["--compute=a"], "not an integer"),
        (["--num_inference_steps=1"], "--compute"),
        (["--prompts=missing.txt"], "cannot read missing.txt"),
        (["--height=7"], "--height"),
        (["--model_id=/nowhere"], "no such folder"),
    ],
)
def test_bad_input_is_refused_before_weights_load(
    model, tmp_path, monkeypatch, capsys, change, message
):
    def refuse(*_, **__):
        raise AssertionError("weights were read before the input was checked")

    monkeypatch.setattr("cogvideox.model.folder.StoredTensor.mapped", refuse)
    monkeypatch.setattr("cogvideox.text.encoder.load_text_encoder", refuse)
    with pytest.raises(SystemExit) as exit_:
        run_main(lambda: run(*arguments(model, tmp_path, *change)))
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error, error


def test_a_file_without_prompts_is_refused(tmp_path):
    path = tmp_path / "prompts.txt"
    for content, message in ((b"# none\n\n", "no prompt"), (b"\xff\xfe", "UTF-8")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            calibrate.read_prompts(path)
