"""Lossy options in batches: ids, programs, files, gallery and reruns."""

import json
import os
import signal
from pathlib import Path

import pytest
from safetensors.numpy import load_file

import batch
import stage1_text_encoder as stage1
import stage2_transformer as stage2
from jobs.records import JobState, read_batch
from runtime.errors import InputError
from stages import files as stage_files
from tests.tiny_models import save_tiny_model

ROOT = Path(__file__).parents[2]
SETTINGS = ["--dtype=float32", "--allow_unsupported", "--num_inference_steps=6", "--seed=5"]
SETTINGS += ["--height=32", "--width=48", "--num_frames=5", "--dp=1", "--sp=1", "--tp=1"]
JOBS = [
    {"prompt": "A red kite", "name": "exact"},
    {"prompt": "A red kite", "name": "near", "speed": "near"},
    {"prompt": "A red kite", "name": "hand", "step_mask": "mask.json", "guidance_until": 0.5},
    {"prompt": "A red kite", "name": "sparse", "sparse_attention": "rules.json", "num_frames": 9},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def run(model: Path, folder: Path, *more: str, jobs: list[dict] = JOBS) -> None:
    (folder / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
    (folder / "mask.json").write_text('{"steps": "110100"}')
    rules = {"rules": {"alone": ["all", "none"]}, "heads": [["alone", "dense"], ["dense", "alone"]]}
    (folder / "rules.json").write_text(json.dumps(rules))
    where = ["jobs.jsonl", "--output_dir=out", f"--model_id={model}"]
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        os.chdir(folder)
        batch.run(batch.parse_arguments([*where, *SETTINGS, *more]))
    finally:
        os.chdir(ROOT)
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def made(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    run(model, folder)
    return folder


def states(folder: Path) -> dict[str, JobState]:
    return {state.job.name: state for state in read_batch(folder / "out")}


def latents(folder: Path) -> bytes:
    return load_file(folder / stage_files.LATENTS_FILE)["latents"].tobytes()


def test_jobs_equal_the_stages_by_hand(made, model, tmp_path):
    folder = tmp_path / "by hand"
    stage1.run(stage1.parse_arguments(
        ["--prompt=A red kite", f"--model_id={model}", f"--output_dir={folder}", "--dtype=float32"]
    ))  # fmt: skip
    found = states(made)
    assert {state.status for state in found.values()} == {"done"}
    options = {
        "exact": [],
        "near": ["--speed=near"],
        "hand": [f"--step_mask={made / 'mask.json'}", "--guidance_until=0.5"],
        "sparse": [f"--sparse_attention={made / 'rules.json'}", "--num_frames=9"],
    }
    seen = set()
    for name, more in options.items():
        stage2.run(stage2.parse_arguments([f"--input_dir={folder}", *SETTINGS, *more]))
        assert latents(folder) == latents(found[name].folder)
        seen.add(latents(folder))
    assert len(seen) == 4


def test_exact_jobs_keep_their_ids_and_files(made, model, tmp_path):
    exact = states(made)["exact"]
    run(model, tmp_path, "--dry_run", jobs=[JOBS[0]])
    stored = json.loads((exact.folder / "job.json").read_text())
    assert stored.pop("speed") == "exact"
    (exact.folder / "job.json").write_text(json.dumps(stored))  # as before there were others
    assert states(made)["exact"].job == exact.job
    assert exact.job.lossy.names == []


def test_other_masks_are_other_jobs(model, tmp_path, capsys):
    names = ["none", "near", "fast"]
    jobs = [{"prompt": "A kite", "name": name, "step_mask": name} for name in names]
    jobs.append({"prompt": "A kite", "name": "again", "step_mask": "near", "mask_steps": 4})
    with pytest.raises(InputError, match="1 line"):
        run(model, tmp_path, "--dry_run", jobs=jobs)
    assert "jobs.jsonl:4: the same video as that of line 2" in capsys.readouterr().err


def test_a_line_that_does_not_fit_is_refused(model, tmp_path, capsys):
    jobs = [
        {"prompt": "A kite", "speed": "near", "mask_steps": 7},
        {"prompt": "A kite", "speed": "quick"},
        {"prompt": "A kite", "guidance_scale": 1, "guidance_until": 0.5},
    ]
    with pytest.raises(InputError):
        run(model, tmp_path, jobs=jobs)
    said = capsys.readouterr().err
    assert "jobs.jsonl:1: --mask_steps 7 is more than the 6 steps" in said
    assert "jobs.jsonl:2: argument --speed: invalid choice: 'quick'" in said
    assert "jobs.jsonl:3: --guidance_until 0.5: this run has no guidance" in said


def test_the_gallery_and_the_plan_name_lossy_options(made, model, capsys):
    page = (made / "out/index.html").read_text()
    assert "step mask (4 of 6 steps computed, not calibrated for this model)" in page
    assert "guidance reused after step 3" in page
    assert "sparse attention after step 2" in page
    assert page.count("lossy") == 3
    run(model, made, "--dry_run")
    said = capsys.readouterr().out
    assert "32x48x5: 1 job(s)" in said and "32x48x5, step mask: 1 job(s)" in said
    assert "32x48x5, step mask, guidance reused: 1 job(s)" in said
    assert "32x48x9, sparse attention: 1 job(s)" in said


@pytest.mark.parametrize(("name", "file"), [("hand", "mask.json"), ("sparse", "rules.json")])
def test_a_rerun_takes_the_same_options(name, file, made, tmp_path):
    video = states(made)[name].folder / stage_files.VIDEO_FILE
    (made / file).unlink()
    again = ["rerun", str(video), f"--output_dir={tmp_path / 'again'}"]
    batch.rerun(batch.parse_rerun([*again[1:], "--dp=1", "--sp=1", "--tp=1"]))
    assert latents(tmp_path / "again") == latents(video.parent)
    first, second = (
        json.loads((folder / stage_files.CONFIG_FILE).read_text())["stage2_transformer"]
        for folder in (video.parent, tmp_path / "again")
    )
    assert first["speed"] == second["speed"] and first["fingerprint"] == second["fingerprint"]
