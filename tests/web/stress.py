"""Many clients, and a server that is killed again and again: is any request lost, or made twice?

    python -m tests.web.stress                         # 200 requests, 20 clients, 10 kills
    python -m tests.web.stress --requests 20 --clients 4 --kills 2

The small shipped model on the CPU in float32, at a small size. The server is killed with SIGKILL at
random moments and started again, while clients make, poll and download. In the end every accepted
request must have its video, no stage that was recorded as done may have run again, and every file
must equal, byte for byte, what the three stage scripts make in a folder of the same name. Prints
JSON; exit code 1 if something is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.client
import io
import json
import os
import random
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jobs.records import OUTPUTS, Job, StageRecord, read_batch
from runtime.exit_codes import run_script
from tests.web.serving import ONE_DEVICE, ROOT, Server

MODEL = ROOT / "models/toyworld"
SMALL = ("--height=32", "--width=48", "--num_frames=5", "--allow_unsupported")
_LOST = (OSError, http.client.HTTPException)  # of a server that was killed
_FOLDER = "videos"

Done = dict[tuple[str, str], StageRecord]  # (folder, stage) -> its record


class Killed:
    """The server, which `kill_often` replaces while clients use it."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.server = self._start()
        self.starts = 1

    def _start(self) -> Server:
        more = (*SMALL, "--max_queue=1000", "--checkpoint_every=1")
        log = self._folder / "log.txt"
        return Server(MODEL, Path(_FOLDER), *more, log=log, cwd=self._folder)

    def restart(self) -> None:
        self.server.kill()
        self.server = self._start()
        self.starts += 1

    def ask(self, method: str, path: str, body: dict | None = None) -> tuple[int, bytes]:
        """Asks until there is an answer."""
        while True:
            try:
                answer = self.server.ask(method, path, body)
                return answer.status, answer.body
            except _LOST:
                time.sleep(0.2)


def body_of(number: int) -> dict:
    colours, shapes = ("red", "green", "blue"), ("circle", "square", "star", "triangle")
    what = f"{colours[number % 3]} {shapes[number % 4]}"
    steps = 2 + number % 5
    return {"prompt": f"a {what} moves left", "seed": number, "num_inference_steps": steps}


def client(killed: Killed, numbers: range) -> dict[str, str]:
    """Makes videos and downloads them; returns their checksums by id."""
    ids = []
    for number in numbers:
        status, answer = killed.ask("POST", "/v1/videos", body_of(number))
        assert status == 200, answer
        ids.append(json.loads(answer)["id"])
    found = {}
    for id_ in ids:
        while True:
            status, answer = killed.ask("GET", f"/v1/videos/{id_}")
            assert status == 200, answer
            video = json.loads(answer)
            assert video["status"] != "failed", video
            if video["status"] == "completed":
                break
            time.sleep(0.5)
        status, content = killed.ask("GET", f"/v1/videos/{id_}/content")
        assert status == 200, content
        found[id_] = hashlib.sha256(content).hexdigest()
    return found


def done_records(output_dir: Path) -> Done:
    states = read_batch(output_dir) if output_dir.exists() else []
    return {
        (state.folder.name, stage): record
        for state in states
        for stage, record in state.records.items()
        if record.status == "done"
    }


def kill_often(
    killed: Killed, output_dir: Path, kills: int, requests: int, moments: random.Random
) -> Done:
    """Kills the server at random moments until all is done; returns what was done before each."""
    seen: Done = {}
    stages = requests * len(OUTPUTS)
    for kill in range(kills):
        wanted = min(len(seen) + moments.randint(0, 2 * stages // (kills + 2)), stages - 1)
        if wanted == len(seen):  # while it starts, or in the first stage
            time.sleep(moments.uniform(0, 10))
        while len(done_records(output_dir)) < wanted:
            time.sleep(0.1)
        time.sleep(moments.uniform(0, 0.5))
        killed.restart()
        seen |= done_records(output_dir)
        print(f"kill {kill + 1}: {len(seen)} of {stages} stages done", file=sys.stderr)
    return seen


def by_hand(job: Job, folder: Path) -> None:
    """Makes a job's files with the three stage scripts."""
    import stage1_text_encoder as stage1
    import stage2_transformer as stage2
    import stage3_vae_decoder as stage3

    s, common = job.settings, ["--dtype=float32"]
    stage1.run(stage1.parse_arguments(
        [f"--prompt={job.prompt}", f"--model_id={MODEL}", f"--output_dir={folder}", *common]
    ))  # fmt: skip
    stage2.run(stage2.parse_arguments(
        [f"--input_dir={folder}", f"--output_dir={folder}", f"--seed={s.seed}", *SMALL, *common,
         f"--num_inference_steps={s.num_inference_steps}", *ONE_DEVICE]
    ))  # fmt: skip
    stage3.run(stage3.parse_arguments(
        [f"--input_dir={folder}", "--dp=1", "--tp=1", *common]
    ), "torchax")  # fmt: skip


def unequal_files(served: Path, jobs: list[Job], folder: Path) -> tuple[int, list[str]]:
    """Compares all files of all jobs with those of the stage scripts; returns how many."""
    os.chdir(folder)
    unequal, compared = [], 0
    for number, job in enumerate(jobs):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            by_hand(job, Path(_FOLDER, job.folder))
        for name in (name for names in OUTPUTS.values() for name in names):
            compared += 1
            file = Path(job.folder, name)
            if (served / file).read_bytes() != (folder / _FOLDER / file).read_bytes():
                unequal.append(str(file))
        if number % 20 == 19:
            print(f"compared {number + 1} of {len(jobs)}", file=sys.stderr)
    return compared, unequal


def prove(folder: Path, arguments: argparse.Namespace) -> dict:
    served = folder / "served"
    hand = folder / "hand"
    served.mkdir()
    hand.mkdir()
    output_dir, start = served / _FOLDER, time.monotonic()
    killed, seen = Killed(served), {}

    def kill() -> None:
        moments = random.Random(arguments.seed)
        seen.update(kill_often(killed, output_dir, arguments.kills, arguments.requests, moments))

    killer = threading.Thread(target=kill)
    with ThreadPoolExecutor(arguments.clients) as pool:
        shares = [range(i, arguments.requests, arguments.clients) for i in range(arguments.clients)]
        running = [pool.submit(client, killed, share) for share in shares]
        killer.start()
        found = {id_: digest for one in running for id_, digest in one.result().items()}
    killer.join()
    seconds = time.monotonic() - start
    with killed.server:
        pass
    states = read_batch(output_dir)
    last = done_records(output_dir)
    on_disk = {
        f"video_{state.job.id}": state.records["stage3_vae_decoder"].outputs["output_video.mp4"]
        for state in states
    }
    compared, unequal = unequal_files(output_dir, [state.job for state in states], hand)
    return {
        "seconds": round(seconds, 1),
        "server_starts": killed.starts,
        "accepted": len(found),
        "jobs": len(states),
        "downloads_equal_the_files": found == on_disk,
        "stages_done_before_a_kill": len(seen),
        "of_these_done_again": sum(last.get(key) != record for key, record in seen.items()),
        "files_compared_with_the_stage_scripts": compared,
        "unequal": unequal,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="keep the files here")
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        report = prove(folder.resolve(), arguments)
    print(json.dumps(report, indent=2))
    good = report["accepted"] == report["jobs"] == arguments.requests
    good = good and report["downloads_equal_the_files"] and not report["of_these_done_again"]
    sys.exit(0 if good and not report["unequal"] else 1)


if __name__ == "__main__":
    run_script(main)
