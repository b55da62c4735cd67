"""A real server makes videos for OpenAI's client, survives SIGKILL, and deletes what it should."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest
from safetensors.numpy import save_file

import stage1_text_encoder as stage1
import stage2_transformer as stage2
import stage3_vae_decoder as stage3
from jobs.records import CONTACT_SHEET_FILE, read_batch
from stages.files import LATENTS_FILE, VIDEO_FILE
from tests.lora_files import block_modules, random_factors
from tests.tiny_models import save_tiny_model
from tests.web.serving import ONE_DEVICE, ROOT, Server

PROMPT = "a red circle moves left on a dark blue background"


pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model whose size is that of other tests, so that its programs are compiled once a run."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_tiny_model(folder, sample_height=4, sample_width=6, sample_frames=5)
    factors = random_factors(folder, block_modules("attn1.to_q"))
    tensors = {}
    for module, (down, up) in factors.items():
        tensors[f"transformer.{module}.lora_A.weight"] = down
        tensors[f"transformer.{module}.lora_B.weight"] = up
    save_file(tensors, folder.parent / "style.safetensors")
    return folder


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """A server with a worker, for tests that need videos."""
    folder = tmp_path_factory.mktemp("served") / "videos"
    with Server(model, folder, f"--lora_dir={model.parent}") as server:
        yield server


@pytest.fixture(scope="module")
def idle(model, tmp_path_factory):
    """A server without a worker, for tests of requests."""
    folder = tmp_path_factory.mktemp("idle") / "videos"
    with Server(model, folder, "--no_worker", f"--lora_dir={model.parent}") as server:
        yield server


def openai_client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def client(idle):
    return openai_client(idle)


@pytest.fixture(scope="module")
def video(server):
    """A finished video of OpenAI's client."""
    client = openai_client(server)
    made = client.videos.create(prompt=PROMPT, size="48x32", extra_body={"seed": 7})
    assert made.object == "video" and made.status == "queued" and made.progress == 0
    while made.status in ("queued", "in_progress"):
        time.sleep(0.1)
        made = client.videos.retrieve(made.id)
    assert (made.status, made.progress, made.error) == ("completed", 100, None)
    assert made.completed_at >= made.created_at
    return made


def test_openai_client_makes_and_downloads(server, video):
    assert (video.prompt, video.size, video.seconds) == (PROMPT, "48x32", "0.31")
    client = openai_client(server)
    (state,) = [s for s in read_batch(server.folder) if s.job.prompt == PROMPT]
    content = client.videos.download_content(video.id)
    assert content.read() == (state.folder / VIDEO_FILE).read_bytes()
    sheet = client.videos.download_content(video.id, variant="spritesheet")
    assert sheet.read() == (state.folder / CONTACT_SHEET_FILE).read_bytes()


def test_a_video_equals_the_stage_scripts(model, server, video, tmp_path):
    """Byte for byte, in a folder of the same name, because the mp4 holds its path."""
    (state,) = [s for s in read_batch(server.folder) if s.job.prompt == PROMPT]
    served = Path(shutil.move(state.folder, tmp_path / "served"))
    try:
        folder, one = str(state.folder), ["--dp=1", "--tp=1"]
        stage1.run(stage1.parse_arguments(
            [f"--prompt={PROMPT}", f"--model_id={model}", f"--output_dir={folder}",
             "--dtype=float32"]
        ))  # fmt: skip
        stage2.run(stage2.parse_arguments(
            [f"--input_dir={folder}", f"--output_dir={folder}", "--num_inference_steps=2",
             "--seed=7", "--dtype=float32", *ONE_DEVICE]
        ))  # fmt: skip
        stage3.run(stage3.parse_arguments(
            [f"--input_dir={folder}", "--dtype=float32", *one]
        ), "torchax")  # fmt: skip
        for name in (VIDEO_FILE, CONTACT_SHEET_FILE):
            assert (state.folder / name).read_bytes() == (served / name).read_bytes()
    finally:
        shutil.rmtree(state.folder, ignore_errors=True)
        shutil.move(served, state.folder)


def test_openai_client_lists_pages(client):
    ids = [client.videos.create(prompt=f"a blue square {i}", seconds="1").id for i in range(3)]
    first = client.videos.list(limit=2)
    assert [one.id for one in first.data] == ids[:0:-1] and first.has_more
    assert [one.id for one in client.videos.list(limit=1, order="asc")] == ids
    assert {one.seconds for one in first} == {"1.06"}
    assert [one.queue_position for one in client.videos.list(order="asc")] == [1, 2, 3]
    for id_ in ids:
        assert client.videos.delete(id_).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.delete(ids[0])
    assert not client.videos.list().data


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"quality": 3}, "quality"),
        ({"step_mask": "/etc/passwd"}, "step_mask"),
        ({"output_dir": "/tmp"}, "output_dir"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_frames": 18}, "num_frames"),
        ({"guidance_scale": "high"}, "guidance_scale"),
        ({"speed": "light"}, "speed"),
        ({"scheduler": "euler"}, "scheduler"),
        ({"lora": "kite"}, "lora"),
    ],
)
def test_openai_client_gets_the_field_that_is_wrong(client, fields, named):
    with pytest.raises(openai.BadRequestError) as error:
        client.videos.create(prompt=PROMPT, extra_body=fields)
    assert error.value.param == named or error.value.param == repr(named)
    assert "--" not in error.value.message


def test_openai_client_gets_other_errors(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.videos.create(prompt=PROMPT, size="100x100")
    assert error.value.param == "size"
    with pytest.raises(openai.NotFoundError) as error:
        client.videos.create(prompt=PROMPT, model="sora-2")
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as error:
        client.videos.create(prompt=PROMPT, input_reference=b"not an image")
    assert error.value.param == "input_reference"
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve("video_0123456789abcdef")
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_the_same_request_is_the_same_video(server, video):
    again = openai_client(server).videos.create(prompt=PROMPT, size="48x32", extra_body={"seed": 7})
    assert (again.id, again.status) == (video.id, "completed")


def test_parts_of_a_video(server, video):
    path = f"/v1/videos/{video.id}/content"
    whole = server.ask("GET", path)
    part = server.ask("GET", path, range="bytes=10-19")
    assert (part.status, part.body) == (206, whole.body[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(whole.body)}"
    assert server.ask("GET", path, range="bytes=99999999-").status == 416
    assert whole.headers["x-content-type-options"] == "nosniff"


def test_events_tell_each_step_until_the_end(server):
    made = server.create(num_inference_steps=200, seed=3)
    events = server.ask("GET", f"/v1/videos/{made['id']}/events").body.decode()
    told = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: ")]
    assert told[0]["status"] in ("queued", "in_progress") and told[-1]["status"] == "completed"
    assert "denoising" in {one["activity"] for one in told}
    done = [one["steps_done"] for one in told]
    assert done == sorted(done) and done[-1] == 200


def test_a_lora_of_the_folder_is_used(server, video):
    """A video of the same settings, but for the LoRA."""
    made = server.create(PROMPT, seed=7, lora="style=0.5")
    assert made["lora"] == "style=0.5" and made["id"] != video.id
    server.wait(made["id"])
    content = [
        server.ask("GET", f"/v1/videos/{id_}/content").body for id_ in (made["id"], video.id)
    ]
    assert content[0] != content[1]
    assert server.ask("GET", "/v1/models").json["data"][0]["loras"] == ["style"]


@pytest.mark.parametrize("lora", ["kite", "../style", "style.safetensors", "style=x", "", "/etc/x"])
def test_other_loras_are_refused(idle, lora):
    answer = idle.ask("POST", "/v1/videos", {"prompt": PROMPT, "lora": lora})
    assert (answer.status, answer.json["error"]["param"]) == (400, "lora"), answer.body
    assert str(idle.folder.parent) not in answer.body.decode()


def test_a_running_video_is_canceled(server):
    made = server.create(num_inference_steps=1000, seed=4)
    server.wait(made["id"], "in_progress")
    server.wait(made["id"], "in_progress")
    answer = server.ask("DELETE", f"/v1/videos/{made['id']}")
    assert answer.json == {"id": made["id"], "object": "video.deleted", "deleted": True}
    assert server.ask("GET", f"/v1/videos/{made['id']}").status == 404
    # The worker renames the folder first and then deletes it.
    for _ in range(2000):
        if not any(path.name.endswith(made["id"][6:]) for path in server.folder.iterdir()):
            break
        time.sleep(0.05)
    assert not [path for path in server.folder.iterdir() if path.name.endswith(made["id"][6:])]


def test_killed_and_started_again_it_goes_on(model, tmp_path):
    """The second server only accepts; a worker of its own makes what is left."""
    folder = tmp_path / "videos"
    with Server(model, folder, "--checkpoint_every=1") as server:
        # It takes seconds, and a worker ends a moment after its server.
        long = server.create(num_inference_steps=500, seed=5)
        short = server.create(seed=6)
        while server.wait(long["id"], "in_progress")["steps_done"] < 2:
            time.sleep(0.02)
        server.kill()
    command = [sys.executable, str(ROOT / "serve.py"), "worker", f"--model_id={model}"]
    command += [f"--output_dir={folder}", "--dtype=float32", "--checkpoint_every=1", *ONE_DEVICE]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    with Server(model, folder, "--no_worker") as server, open(tmp_path / "log", "w") as log:
        worker = subprocess.Popen(command, env=environment, stdout=log)
        try:
            done = [server.wait(one["id"]) for one in (long, short)]
            worker.terminate()
            assert worker.wait(60) == 0
        finally:
            worker.kill()
    assert "resuming from" in (tmp_path / "log").read_text()
    assert [one["created_at"] for one in done] == [long["created_at"], short["created_at"]]


def test_workers_of_a_ray_cluster(model, server, video, tmp_path):
    """They make the same latents, and end with the server."""
    with Server(model, tmp_path / "videos", "--engine=ray") as ray_server:
        made = ray_server.create(PROMPT, size="48x32", seed=7)
        ray_server.wait(made["id"])
        # The videos' tags name their paths.
        latents = [
            next(one.folder.glob(f"*-{id_[6:]}/{LATENTS_FILE}")).read_bytes()
            for one, id_ in ((ray_server, made["id"]), (server, video.id))
        ]
    assert ray_server.process.returncode == 128 + signal.SIGTERM
    assert latents[0] == latents[1]
