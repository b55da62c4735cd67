"""LoRAs in batches: ids, files, swaps of weights, gallery, tags and reruns."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.numpy import load_file

import batch
import stage1_text_encoder as stage1
import stage2_transformer as stage2
from cogvideox.denoising.program import Denoiser
from cogvideox.video.reading import read_comment
from jobs.records import JobState, read_batch
from runtime.compilation import CompilationLog
from runtime.errors import InputError
from stages import files as stage_files
from tests.lora_files import ATTENTION, block_modules, random_factors, write_lora
from tests.tiny_models import save_tiny_model

ROOT = Path(__file__).parents[2]
SETTINGS = ["--dtype=float32", "--allow_unsupported", "--num_inference_steps=2", "--seed=5"]
SETTINGS += ["--height=32", "--width=48", "--num_frames=5"]
MESH = ["--dp=1", "--sp=1", "--tp=1"]
JOBS = [
    {"prompt": "A red kite", "name": "base"},
    {"prompt": "A red kite", "name": "style", "lora": "style.safetensors"},
    {"prompt": "A red kite", "name": "both", "lora": ["style.safetensors=-0.5", "ff.safetensors"]},
    {"prompt": "A red kite", "name": "base-again", "seed": 6},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def write_loras(model: Path, folder: Path) -> None:
    write_lora(folder / "style.safetensors", random_factors(model, block_modules(*ATTENTION)))
    factors = random_factors(model, block_modules("ff.net.2"), 2, seed=1)
    write_lora(folder / "ff.safetensors", factors)


def run(model: Path, folder: Path, *more: str, jobs: list[dict] = JOBS) -> None:
    (folder / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
    where = ["jobs.jsonl", "--output_dir=out", f"--model_id={model}"]
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        os.chdir(folder)
        batch.run(batch.parse_arguments([*where, *SETTINGS, *MESH, *more]))
    finally:
        os.chdir(ROOT)
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def made(model, tmp_path_factory) -> tuple[Path, list]:
    """A folder with a finished batch; and names and compilations of each load of parameters."""
    folder, loads = tmp_path_factory.mktemp("made"), []
    write_loras(model, folder)
    load, log = Denoiser.load, CompilationLog()

    def recorded(self, executables=None, names=None):
        before = log.compiled + log.cache_hits
        loaded = load(self, executables, names)
        loads.append((names, log.compiled + log.cache_hits - before))
        return loaded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Denoiser, "load", recorded)
        run(model, folder)
    return folder, loads


@pytest.fixture(scope="module")
def jobs(made) -> dict[str, JobState]:
    return {state.job.name: state for state in read_batch(made[0] / "out")}


def latents(folder: Path) -> bytes:
    return load_file(folder / stage_files.LATENTS_FILE)["latents"].tobytes()


def section(folder: Path) -> dict:
    return json.loads((folder / stage_files.CONFIG_FILE).read_text())["stage2_transformer"]


def test_jobs_equal_the_stages_by_hand(made, jobs, model, tmp_path):
    assert {state.status for state in jobs.values()} == {"done"}
    style, ff = (made[0] / name for name in ("style.safetensors", "ff.safetensors"))
    options = {
        "style": [f"--lora={style}"],
        "both": [f"--lora={style}=-0.5", f"--lora={ff}"],
        "base-again": ["--seed=6"],
    }
    folder, seen = tmp_path / "by hand", set()
    where = [f"--model_id={model}", f"--output_dir={folder}", "--dtype=float32"]
    stage1.run(stage1.parse_arguments(["--prompt=A red kite", *where]))
    for name, more in options.items():
        arguments = [f"--input_dir={folder}", *SETTINGS, *MESH, *more]
        stage2.run(stage2.parse_arguments(arguments))
        own = jobs[name].folder
        assert latents(folder) == latents(own), name
        assert section(folder)["fingerprint"] == section(own)["fingerprint"], name
        seen.add(latents(own))
    assert len(seen) == len(options)


def test_a_change_loads_only_what_the_loras_touch_and_compiles_nothing(made):
    attention = {f"transformer_blocks.{name}.weight" for name in ATTENTION}
    both = attention | {"transformer_blocks.ff.net.2.weight"}
    # Jobs without LoRAs come together; the swaps are base, style, style and ff.
    assert made[1] == [(None, 0), (attention, 0), (both, 0)]


def test_records_tell_the_files(made, jobs):
    folder = jobs["both"].folder
    tag = json.loads(read_comment(folder / stage_files.VIDEO_FILE) or "")
    assert tag["stage2_transformer"]["lora"] == section(folder)["lora"] == jobs["both"].job.lora
    first, second = section(folder)["lora"]
    assert first["file"] == str(made[0] / "style.safetensors") and first["weight"] == -0.5
    assert len(first["sha256"]) == 64 and second["weight"] == 1
    assert "lora" not in section(jobs["base"].folder)
    page = (made[0] / "out/index.html").read_text()
    assert "style.safetensors (-0.5), ff.safetensors" in page


def test_ids_follow_the_content_of_the_files(made, jobs, model, tmp_path, capsys):
    write_loras(model, tmp_path)
    moved = tmp_path / "elsewhere.safetensors"
    (tmp_path / "style.safetensors").rename(moved)
    lines = [
        {"prompt": "A red kite", "name": "a", "lora": str(moved)},
        {"prompt": "A red kite", "name": "b", "lora": f"{moved}=0.5"},
        {"prompt": "A red kite", "name": "c", "lora": []},
    ]
    run(model, tmp_path, "--dry_run", f"--lora={moved}=0.25", jobs=lines)
    plan = capsys.readouterr().out
    assert jobs["style"].job.id in plan and jobs["base"].job.id in plan
    # Jobs without a LoRA keep the ids that they had before there were LoRAs.
    assert dataclasses.replace(jobs["base"].job, lora=[]).id == jobs["base"].job.id


def test_a_bad_lora_is_a_bad_line(model, tmp_path, capsys):
    lines = [
        {"prompt": "A kite", "lora": "absent.safetensors"},
        {"prompt": "A kite", "lora": ["a=900"]},
        {"prompt": "A kite", "lora": {"file": "a"}},
    ]
    with pytest.raises(InputError):
        run(model, tmp_path, jobs=lines)
    said = capsys.readouterr().err
    assert "jobs.jsonl:1: --lora absent.safetensors: there is no such file" in said
    assert "jobs.jsonl:2: --lora a=900: the weight must be from -100 to 100" in said
    assert 'jobs.jsonl:3: lora is neither "FILE=WEIGHT" nor a list' in said


def rerun(video: Path, output_dir: Path, *more: str) -> None:
    batch.rerun(batch.parse_rerun([str(video), f"--output_dir={output_dir}", *MESH, *more]))


def test_a_rerun_finds_a_moved_file_by_its_sha256(made, jobs, model, tmp_path):
    video = Path(shutil.copy(jobs["style"].folder / stage_files.VIDEO_FILE, tmp_path / "a.mp4"))
    style = made[0] / "style.safetensors"
    moved = tmp_path / "loras" / "another-name.safetensors"
    moved.parent.mkdir()
    style.rename(moved)
    try:
        with pytest.raises(InputError) as refused:
            rerun(video, tmp_path / "again")
        assert "the LoRA style.safetensors of this video (sha256 " in str(refused.value)
        assert "is missing" in str(refused.value) and "--lora" in str(refused.value)
        write_lora(style, random_factors(model, block_modules("attn1.to_q"), seed=9))
        with pytest.raises(InputError, match="is another file now; name its place with --lora"):
            rerun(video, tmp_path / "again")
        rerun(video, tmp_path / "again", f"--lora={moved.parent}")
    finally:
        shutil.copy(moved, style)
    assert latents(tmp_path / "again") == latents(jobs["style"].folder)
    assert section(tmp_path / "again")["lora"][0]["file"] == str(moved)
