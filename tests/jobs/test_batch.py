"""batch.py equals the stages, loads once, resumes, and goes on after a failed job."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import ray

import batch
import stage1_text_encoder as stage1
import stage2_transformer as stage2
import stage3_vae_decoder as stage3
from cogvideox.denoising.program import Denoiser
from cogvideox.text import encoder as text_encoder
from jobs import ray_engine, steps
from jobs.gallery import Gallery
from jobs.records import OUTPUTS, STAGES, read_batch, write_record
from jobs.runner import Runner
from runtime.errors import InputError, RunError, Stopped
from stages import denoise, session
from stages import files as stage_files
from tests.tiny_models import save_tiny_model

ROOT = Path(__file__).parents[2]
# Two shapes in mixed order.
JOBS = [
    {"prompt": "A red kite", "size": "32x48", "num_frames": 5, "name": "kite"},
    {"prompt": "A blue kite", "size": "32x32", "num_frames": 9, "guidance": 1},
    {"prompt": "A red kite", "size": "32x48", "num_frames": 5, "seed": 0, "scheduler": "ddim"},
]
_ONE_DEVICE = ["--dp=1", "--sp=1", "--tp=1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def command(model: Path, folder: Path, *more: str, jobs: list[dict] = JOBS) -> list[str]:
    """Writes a job file; returns the arguments of its batch in `folder`/out."""
    (folder / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
    settings = ["--dtype=float32", "--allow_unsupported", "--num_inference_steps=3", "--seed=5"]
    where = [str(folder / "jobs.jsonl"), "--output_dir=out", f"--model_id={model}"]
    return [*where, *settings, *_ONE_DEVICE, *more]


def run(model: Path, folder: Path, *more: str, jobs: list[dict] = JOBS) -> int:
    """Runs a batch in this process, in `folder`; returns its exit code."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        os.chdir(folder)
        batch.run(batch.parse_arguments(command(model, folder, *more, jobs=jobs)))
    except SystemExit as exit_:
        return exit_.code
    finally:
        os.chdir(ROOT)
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def outputs(folder: Path) -> dict[str, bytes]:
    names = [name for files in OUTPUTS.values() for name in files] + [stage_files.CONFIG_FILE]
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.glob("out/*/*")
        if path.name in names and path.is_file()
    }


def records(folder: Path) -> dict[tuple[str, str], object]:
    states = read_batch(folder / "out")
    return {(s.folder.name, stage): r for s in states for stage, r in s.records.items()}


@pytest.fixture(scope="module")
def calls() -> Counter:
    """Counts how often weights are loaded and programs compiled."""
    return Counter()


@pytest.fixture(autouse=True)
def counted(calls, monkeypatch):
    def count(owner, name):
        function = getattr(owner, name)

        def counting(*arguments, **options):
            calls[name] += 1
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, counting)

    calls.clear()
    count(text_encoder, "load_text_encoder")
    count(Denoiser, "load")
    count(Denoiser, "compile")
    for name in ("_encode", "_denoise", "_decode"):
        count(session.Session, name)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> Path:
    """Makes an undisturbed batch."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(model, folder) == 0
    return folder


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    subprocess.run(["cp", "-a", f"{whole}/.", tmp_path], check=True)
    return tmp_path


def job_folder(folder: Path, start: str) -> Path:
    (found,) = folder.glob(f"out/{start}*")
    return found


def test_loads_and_compiles_once(model, tmp_path, calls, capsys):
    assert run(model, tmp_path) == 0
    assert calls == Counter(
        load_text_encoder=1, load=1, compile=2, _encode=3, _denoise=3, _decode=3
    )
    said = capsys.readouterr().out
    assert "[3 done, 0 failed, 0 left]" in said and "ETA" in said
    assert said.startswith("checking 3 job(s): importing JAX, starting the devices ...\n")
    for activity in ("encoding 3 prompt(s)", "loading the VAE decoder"):
        assert said.count(f"\n{activity}") == 1, activity
    assert len(re.findall("^32x48x5: .* the VAE decoder's programs", said, re.MULTILINE)) == 1
    assert "3 done" in table(tmp_path, capsys)


def table(folder: Path, capsys) -> str:
    capsys.readouterr()
    batch.status(batch.parse_status([str(folder / "out")]))
    return capsys.readouterr().out


def test_steps_of_the_running_job_are_shown(model, tmp_path, capsys, monkeypatch):
    """In `status` of another process, and in the batch's own output with the job's name."""
    monkeypatch.setattr(steps, "_EVERY_SECONDS", 0.0)
    seen, make_steps = [], Denoiser.compile

    def compile_and_watch(self, *arguments):
        found = make_steps(self, *arguments)

        def watched(*arguments):
            seen.append(table(tmp_path, capsys))
            return found["off"](*arguments)

        return {"off": watched}

    monkeypatch.setattr(Denoiser, "compile", compile_and_watch)
    assert run(model, tmp_path, jobs=JOBS[:1]) == 0
    rows = [row for said in seen for row in said.splitlines() if " running " in row]
    assert [re.search(r"  (\d/\d)  +5  ", row)[1] for row in rows] == ["0/3", "1/3", "2/3"]
    assert f"{job_folder(tmp_path, 'kite').name}: denoising: 3 of 3" in capsys.readouterr().err
    assert not list(tmp_path.rglob(steps.STEPS_FILE))


def test_a_job_equals_the_stages_by_hand(model, whole, tmp_path, monkeypatch):
    """Uses a folder of the same name, since the video's settings hold its path."""
    name = job_folder(whole, "kite").name
    monkeypatch.chdir(tmp_path)
    folder = Path("out", name)
    common = ["--dtype=float32"]
    stage1.run(stage1.parse_arguments(
        ["--prompt=A red kite", f"--model_id={model}", f"--output_dir={folder}", *common]
    ))  # fmt: skip
    size = ["--height=32", "--width=48", "--frames=5", "--allow_unsupported"]
    stage2.run(stage2.parse_arguments(
        [f"--input_dir={folder}", *size, "--num_inference_steps=3", "--seed=5", *common,
         *_ONE_DEVICE]
    ))  # fmt: skip
    stage3.run(stage3.parse_arguments(
        [f"--input_dir={folder}", *common, "--dp=1", "--tp=1"]
    ), "torchax")  # fmt: skip
    by_hand = outputs(tmp_path)
    assert len(by_hand) == 5
    assert by_hand.items() <= outputs(whole).items()


def test_again_computes_nothing(model, copy, calls):
    before = records(copy)
    assert run(model, copy) == 0
    assert not calls and records(copy) == before


def test_what_is_damaged_is_made_again_from_the_last_good_stage(model, copy, whole, calls):
    (job_folder(copy, "kite") / stage_files.VIDEO_FILE).unlink()
    with open(job_folder(copy, "a-blue") / stage_files.LATENTS_FILE, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    (job_folder(copy, "a-red") / stage_files.CONFIG_FILE).write_text("{")
    (job_folder(copy, "a-red") / stage_files.EMBEDDINGS_FILE).unlink()
    assert run(model, copy) == 0
    assert (calls["_encode"], calls["_denoise"], calls["_decode"]) == (1, 1, 1)
    assert outputs(copy) == outputs(whole)


def test_a_damaged_config_is_written_again_without_work(model, copy, whole, calls):
    (job_folder(copy, "kite") / stage_files.CONFIG_FILE).unlink()
    assert run(model, copy) == 0
    assert not calls and outputs(copy) == outputs(whole)


def test_a_changed_line_is_a_new_job(model, copy, calls, capsys):
    before = outputs(copy)
    jobs = [JOBS[0] | {"prompt": "A green kite"}, *JOBS[1:]]
    assert run(model, copy, jobs=jobs) == 0
    assert calls["_denoise"] == 1 and len(read_batch(copy / "out")) == 4
    assert before.items() <= outputs(copy).items()
    cards = re.findall('<article data-status="([a-z]+)"', (copy / "out/index.html").read_text())
    assert sorted(cards) == ["done", "done", "done", "superseded"]
    assert "4 job(s): 3 done, 1 superseded" in table(copy, capsys)


def test_one_failure_ends_no_other_job(model, whole, tmp_path, calls, capsys, monkeypatch):
    run_stage = session.Session._denoise

    def fail_blue(self, request):
        if "blue" in request.encode.prompt[0]:
            raise RuntimeError("the chip melted\nat noon")
        run_stage(self, request)

    with monkeypatch.context() as patch:
        patch.setattr(session.Session, "_denoise", fail_blue)
        assert run(model, tmp_path) == 3
    said = table(tmp_path, capsys)
    assert "2 done, 1 failed" in said and "RuntimeError: the chip melted at noon" in said
    capsys.readouterr()
    assert run(model, tmp_path) == 3 and calls["_denoise"] == 2
    said = capsys.readouterr().out
    name = job_folder(tmp_path, "a-blue").name
    assert f"failed: {name} (line 2): stage2_transformer: RuntimeError: the chip" in said
    assert "--retry_failed" in said
    assert run(model, tmp_path, "--dry_run") == 0
    said = capsys.readouterr().out
    assert f"{name} (line 2): failed; --retry_failed" in said and said.count("(line ") == 3
    assert run(model, tmp_path, "--retry_failed") == 0 and calls["_denoise"] == 3
    assert outputs(tmp_path) == outputs(whole)
    assert records(tmp_path)[job_folder(tmp_path, "a-blue").name, STAGES[1]].attempt == 2


def test_the_gallery_follows_every_failure(model, tmp_path, monkeypatch):
    run_stage, seen = session.Session._encode, []

    def fail_blue(self, request):
        if "blue" in request.encode.prompt[0]:
            raise RuntimeError("no memory")
        run_stage(self, request)

    def update(self, *, now=False):
        seen.append(Counter(state.status for state in read_batch(tmp_path / "out")))

    monkeypatch.setattr(session.Session, "_encode", fail_blue)
    monkeypatch.setattr(Gallery, "update", update)
    assert run(model, tmp_path, "--stages=1") == 3
    assert seen[0] == Counter(pending=3)
    assert len(seen) == 5 and seen[2]["failed"] == 1  # the start, each job, the end


def test_latents_now_videos_later(model, whole, tmp_path, calls, capsys):
    assert run(model, tmp_path, "--stages=1,2") == 0
    assert calls["_decode"] == 0 and "pending" in table(tmp_path, capsys)
    assert run(model, tmp_path, "--stages=3", "--only=kite") == 0
    assert calls["_decode"] == 1 and calls["_denoise"] == 3
    assert run(model, tmp_path, "--stages=3") == 0
    assert outputs(tmp_path) == outputs(whole)


def test_the_plan(model, copy, tmp_path, capsys):
    (job_folder(copy, "kite") / stage_files.VIDEO_FILE).unlink()
    before = sorted(copy.rglob("*"))
    assert run(model, copy, "--dry_run") == 0
    said = capsys.readouterr().out
    assert "32x48x5: 2 job(s), 1 to do, mesh dp=1 sp=1 tp=1, about 0 min" in said
    assert "3 job(s) of 2 shape(s)" in said
    assert sorted(copy.rglob("*")) == before


def resume_by_hand(job: Path, folder: Path) -> bytes:
    """Ends stage 2 of a stopped job with the stage script, in a copy of its folder."""
    subprocess.run(["cp", "-a", job, folder], check=True)
    size = ["--height=32", "--width=48", "--frames=5", "--allow_unsupported"]
    stage2.run(stage2.parse_arguments(
        [f"--input_dir={folder}", *size, "--num_inference_steps=3", "--seed=5", "--dtype=float32",
         "--checkpoint_every=10", *_ONE_DEVICE]
    ))  # fmt: skip
    assert not list(folder.glob("stage2_checkpoint*"))
    return (folder / stage_files.LATENTS_FILE).read_bytes()


def test_stopping_saves_the_loop_and_the_records(model, whole, tmp_path, capsys, monkeypatch):
    """Stops as a signal does, in the second step of the first video."""
    write, saved = denoise.Checkpoints.__init__, []

    def stop_in_step_two(self, folder, section, every, stop):
        def stop_now():
            saved.append(folder)
            if len(saved) == 2:
                signal.raise_signal(signal.SIGTERM)
            return stop()

        write(self, folder, section, every, stop_now)

    with monkeypatch.context() as patch:
        patch.setattr(denoise.Checkpoints, "__init__", stop_in_step_two)
        with pytest.raises(Stopped, match="terminated"):
            run(model, tmp_path, "--checkpoint_every=10")
    state = next(s for s in read_batch(tmp_path / "out") if s.job.name == "kite")
    assert state.status == "interrupted"
    (checkpoint,) = state.folder.glob("stage2_checkpoint-*.safetensors")
    by_hand = resume_by_hand(state.folder, tmp_path / "by hand")
    assert f"resuming from {tmp_path / 'by hand' / checkpoint.name}" in capsys.readouterr().out
    assert by_hand == (job_folder(whole, "kite") / stage_files.LATENTS_FILE).read_bytes()
    assert run(model, tmp_path, "--checkpoint_every=10") == 0
    assert "2 of 3 steps done" in capsys.readouterr().out
    assert outputs(tmp_path) == outputs(whole)


def test_an_output_made_of_other_inputs_is_made_again(model, copy, calls):
    """This happens after an upgrade that changed the bits of the inputs."""
    (name, stage) = job_folder(copy, "kite").name, STAGES[2]
    record = records(copy)[name, stage]
    changed = dataclasses.replace(record, inputs={stage_files.LATENTS_FILE: "0" * 64})
    write_record(copy / "out" / name, changed)
    assert run(model, copy) == 0 and calls["_decode"] == 1 and calls["_denoise"] == 0


def test_damage_to_one_job_costs_no_other(model, copy, whole, calls, capsys):
    """Jobs that can be repaired are made again; each other one fails alone, by name."""
    kite, blue, red = (job_folder(copy, start) for start in ("kite", "a-blue", "a-red"))
    (kite / "job.json").write_bytes(b"[" * 200_000)
    (kite / "stage3_record.json").write_text('{"stage": 3}')
    last = max((kite / "claims").iterdir(), key=lambda path: int(path.name))
    last.write_text("{")
    (blue / "job.json").unlink()
    (blue / "stage2_record.json").unlink()
    os.mkfifo(blue / "stage2_record.json")
    (red / stage_files.EMBEDDINGS_FILE).unlink()
    subprocess.run(["rm", "-r", red / "claims"], check=True)
    (red / "claims").touch()
    assert run(model, copy) == 3
    said = capsys.readouterr()
    assert f"failed: {red.name} (line 3): cannot be claimed" in said.out
    assert f"{kite.name}/claims/{last.name}" in said.out
    assert "stage3_record.json is not one" in said.err
    assert "stage2_record.json is a named pipe" in said.err
    assert (calls["_encode"], calls["_denoise"], calls["_decode"]) == (0, 1, 1)
    made = {name: data for name, data in outputs(copy).items() if red.name not in name}
    assert made.items() <= outputs(whole).items() and len(made) == 10
    (red / "claims").unlink()
    assert run(model, copy) == 0 and outputs(copy) == outputs(whole)


def test_a_record_that_cannot_be_written_fails_before_the_work(model, copy, calls, capsys):
    kite = job_folder(copy, "kite")
    (kite / "stage3_record.json").unlink()
    (kite / "stage3_record.json").mkdir()
    assert run(model, copy) == 3 and calls["_decode"] == 0
    assert "stage3_record.json is a folder; delete it" in capsys.readouterr().out


@pytest.mark.parametrize(("owner", "name"), [(Runner, "_do"), (session.Session, "_encode")])
def test_one_that_slept_past_its_claim_changes_no_record(
    owner, name, model, whole, tmp_path, capsys, monkeypatch
):
    """It sleeps before or within a stage, while another batch finishes the job."""
    function, seen = getattr(owner, name), {}

    def sleep_and_go_on(*arguments):
        claim = max(job_folder(tmp_path, "kite").glob("claims/*"), key=lambda path: int(path.name))
        if not seen and claim.stat().st_mtime:
            os.utime(claim, (1, 1))
            seen["none yet"] = None
            assert run(model, tmp_path) == 0  # the other batch
            os.chdir(tmp_path)
            seen.update(records(tmp_path))
        function(*arguments)

    monkeypatch.setattr(owner, name, sleep_and_go_on)
    assert run(model, tmp_path) == 0
    del seen["none yet"]
    assert len(seen) == 9 and records(tmp_path) == seen
    assert "another process has taken over" in capsys.readouterr().out
    assert outputs(tmp_path) == outputs(whole)


def test_the_output_folder_is_removed_while_it_runs(model, tmp_path, monkeypatch):
    run_stage = session.Session._denoise

    def remove(self, request):
        subprocess.run(["rm", "-r", tmp_path / "out"], check=True)
        run_stage(self, request)

    monkeypatch.setattr(session.Session, "_denoise", remove)
    with pytest.raises(RunError, match="out was removed, moved or replaced"):
        run(model, tmp_path)


def test_a_finished_job_that_is_removed_while_others_run_is_made_again(
    model, whole, tmp_path, monkeypatch
):
    run_stage, removed = session.Session._decode, []

    def remove(self, request):
        if "blue" in request.encode.prompt[0] and not removed:
            removed.append(job_folder(tmp_path, "kite"))
            subprocess.run(["rm", "-r", removed[0]], check=True)
        run_stage(self, request)

    monkeypatch.setattr(session.Session, "_decode", remove)
    assert run(model, tmp_path) == 0 and removed
    assert outputs(tmp_path) == outputs(whole)


def test_processes_share_a_folder_and_survive_kills(model, whole, tmp_path):
    """Two run at once; one is killed, one is asked to end; a third finishes."""

    def start() -> subprocess.Popen:
        flags = "--xla_force_host_platform_device_count=1"
        return subprocess.Popen(
            [sys.executable, ROOT / "batch.py", *command(model, tmp_path)],
            cwd=tmp_path,
            env=os.environ | {"XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            text=True,
        )

    first, second = start(), start()
    for line in second.stdout:
        if "compilation cache" in line:  # from here on it handles signals
            break
    while not (tmp_path / "out").exists() or not records(tmp_path):
        assert first.poll() is None and second.poll() is None
        time.sleep(0.05)
    first.kill()
    time.sleep(0.5)
    second.send_signal(signal.SIGTERM)
    said = second.communicate()[0]
    assert second.returncode in (143, 0), said  # 0 if it was done before the signal
    first.communicate()
    done = {key: r for key, r in records(tmp_path).items() if r.status == "done"}
    third = start()
    assert third.communicate() and third.returncode == 0
    assert done.items() <= records(tmp_path).items()
    assert outputs(tmp_path) == outputs(whole)


def test_a_mirror_outlives_the_machine(model, whole, tmp_path, calls, capsys):
    """Copied files are not made again elsewhere; fsspec's memory stands for a bucket."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    mirror = f"--mirror=memory://{tmp_path.name}"
    assert run(model, first, "--stages=1,2", mirror) == 0
    assert run(model, first, "--only=kite", mirror) == 0
    calls.clear()
    assert run(model, second, mirror) == 0
    assert (calls["_encode"], calls["_denoise"], calls["_decode"]) == (0, 0, 2)
    assert outputs(second) == outputs(whole)
    assert "was not copied" not in capsys.readouterr().out


def test_a_mirror_that_fails_costs_no_video(model, whole, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise OSError("no network")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.put_file", fail)
    with pytest.raises(RunError, match="no network"):
        run(model, tmp_path, f"--mirror=memory://{tmp_path.name}")
    assert "was not copied to the mirror" in capsys.readouterr().out
    assert outputs(tmp_path) == outputs(whole)


@pytest.fixture
def ray_cluster():
    """Ends the cluster that a test started, which would run on during later tests."""
    yield
    ray.shutdown()


@pytest.mark.usefixtures("ray_cluster")
def test_a_ray_cluster_of_this_machine(model, whole, tmp_path, calls):
    """Its worker makes the same files; a job that fails there counts as failed."""
    jobs = [*JOBS, {"prompt": "A black kite", "size": "32x48", "num_frames": 5, "name": "cursed"}]
    cursed = run(model, tmp_path, "--stages=1", "--only=cursed", jobs=jobs)
    assert cursed == 0
    folder = job_folder(tmp_path, "cursed")
    (folder / stage_files.LATENTS_FILE).mkdir()  # so that stage 2 cannot write there
    calls.clear()
    assert run(model, tmp_path, "--engine=ray", jobs=jobs) == 3
    assert not calls  # nothing was done in this process
    assert records(tmp_path)[folder.name, STAGES[1]].status == "failed"
    made = outputs(tmp_path)
    assert outputs(whole).items() <= made.items()


def test_what_a_script_prepares_is_left_to_the_workers_of_ray(model, tmp_path, monkeypatch):
    """The machine that starts a batch may have other devices and another cache."""
    taken = []
    monkeypatch.setattr("jobs.batch.run", lambda options, parse: taken.append(options))
    monkeypatch.setattr("runtime.devices.has_devices", lambda _: False)
    digest, folder = "0" * 64, tmp_path / "executables"
    folder.mkdir()
    more = ["--platform=tpu", f"--trust_executables={digest}", f"--executables={folder}"]
    with pytest.raises(InputError, match="--platform tpu: this machine has no TPU"):
        run(model, tmp_path, *more)
    assert run(model, tmp_path, *more, "--engine=ray") == 0
    (options,) = taken
    assert (options.platform, options.trust_executables) == ("tpu", digest)
    assert options.executables == folder
    with pytest.raises(InputError, match="--platform tpu: this machine has no TPU"):
        ray_engine.prepare_machine(options)
    options = dataclasses.replace(options, platform=None)
    with pytest.raises(InputError, match=f"not {digest} of --trust_executables"):
        ray_engine.prepare_machine(options)
    options = dataclasses.replace(options, trust_executables=None)
    assert ray_engine.prepare_machine(options) == options
