"""How soon a request is denoised, and how fast the server answers while a video is made.

    python -m tests.web.latency

The small shipped model on the CPU in float32. Prints JSON: seconds from a request to its first
step, with the program compiled and loaded by an earlier request; milliseconds of answers during
denoising and decoding; and what a preview costs a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path

from jobs.records import read_batch
from jobs.steps import read_steps
from tests.web.serving import ROOT, Server

MODEL = ROOT / "models/toyworld"
_PROMPT = "a red circle moves left on a dark blue background"


def first_step(server: Server, seed: int) -> float:
    """Seconds from the sending of a request to the start of its denoising loop."""
    sent = time.time()
    made = server.create(_PROMPT, seed=seed)
    (folder,) = server.folder.glob(f"*-{made['id'].removeprefix('video_')}")
    while True:
        steps = read_steps(folder, print)
        if steps and steps.since:
            break
        time.sleep(0.002)
    server.wait(made["id"])
    return steps.since - sent


def answers(server: Server, seed: int) -> dict[str, list[float]]:
    """Milliseconds of each kind of answer while one video after another is made."""
    found: dict[str, list[float]] = {"get": [], "list": [], "create": [], "health": []}
    ids = [server.create(_PROMPT, seed=seed + i)["id"] for i in range(3)]
    stop = threading.Event()

    def measure() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            asks = {
                "get": lambda: server.ask("GET", f"/v1/videos/{ids[0]}"),
                "list": lambda: server.ask("GET", "/v1/videos"),
                "health": lambda: server.ask("GET", "/healthz"),
                "create": lambda: server.create(_PROMPT, seed=seed),  # known: nothing is made
            }
            for name, ask in asks.items():
                start = time.perf_counter()
                ask()
                found[name].append(1000 * (time.perf_counter() - start))
                time.sleep(0.02)

    thread = threading.Thread(target=measure)
    thread.start()
    for id_ in ids:
        server.wait(id_)
    stop.set()
    thread.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=10)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        started = time.monotonic()
        with Server(MODEL, Path(name, "videos"), "--num_inference_steps=25") as server:
            start_seconds = time.monotonic() - started
            server.wait(server.create(_PROMPT, seed=0)["id"])
            firsts = [first_step(server, 1 + i) for i in range(arguments.requests)]
            found = answers(server, 1000)
            seconds = [s.seconds for s in read_batch(server.folder) if s.status == "done"]
    every = [one for kind in found.values() for one in kind]
    print(json.dumps({
        "server_accepts_after_s": round(start_seconds, 2),
        "request_to_first_step_s": {
            "median": round(statistics.median(firsts), 3), "worst": round(max(firsts), 3),
        },
        "video_s": round(statistics.median(seconds), 2),
        "answers": len(every),
        "answer_ms": {
            "median": round(statistics.median(every), 1),
            "95%": round(statistics.quantiles(every, n=20)[-1], 1),
            **{name: round(statistics.median(kind), 1) for name, kind in found.items()},
        },
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
