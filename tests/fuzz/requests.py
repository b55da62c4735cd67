"""Sends malformed, oversized and hostile requests to a server; every answer must be 4xx.

    python -m tests.fuzz.requests                 # 500 bodies, and as many paths, headers and lines
    python -m tests.fuzz.requests --count 40 --seed 1

The server only accepts: no worker, the small shipped model. It runs in a folder of its own. In the
end it must still answer, have accepted nothing, have written nothing anywhere, and have taken a
bounded amount of memory. Prints JSON; exit code 1 if something is wrong.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.web.serving import ROOT, Server

_MEMORY = 400 << 20
# Seconds until a client of what is no request says that nothing more comes, and until it gives up.
_PATIENCE, _TIMEOUT = 3.0, 60.0
_HTML = "<script>alert(1)</script><img src=x onerror=alert(1)>"
_PATHS = ("../../etc/passwd", "/etc/passwd", "..\\..\\x", "file:///etc/passwd", "~/.ssh/id_rsa")
_NUMBERS = (-1, 0, 10**30, -(10**30), 1.5, 1e308, "1e999", "NaN", "0x10", "1_000", "٣", " 1", "")
_FIELDS = (
    *("negative_prompt", "num_frames", "fps", "num_inference_steps", "guidance_scale", "seed"),
    *("use_dynamic_cfg", "scheduler", "speed", "size", "seconds", "model", "lora"),
    "input_reference",
)
_UNKNOWN = (
    *("output_dir", "step_mask", "model_id", "executables", "profile", "preview_factors", "id"),
    *("__proto__", "constructor", "prompt\0", "prompt ", "--prompt", "Prompt", "", _HTML, "ключ"),
    *("height", "width", "name", "seeds", "quality", "allow_unsupported", "checkpoint_every"),
)
# Values that are wrong for every field.
_WRONG: tuple[Any, ...] = (
    *([], {}, [1], {"a": {"b": 1}}, ["x"] * 50, "\0", "\0" * 9),
    *(f"{path}\0" for path in _PATHS),
)

_AT_ONCE = 8

Raw = bytes
Make = Callable[[random.Random], Raw]


def post(body: bytes, kind: str = "application/json", *more: str) -> Raw:
    """A request to make a video."""
    lines = ["POST /v1/videos HTTP/1.1", "Host: localhost", f"Content-Type: {kind}"]
    lines += [f"Content-Length: {len(body)}", "Connection: close", *more]
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape") + body


def wrong_json(rng: random.Random) -> Raw:
    """A JSON body with one thing wrong."""
    good = {"prompt": "a red circle moves left", "seed": 1}
    kind = rng.randrange(9)
    if kind == 0:
        return post(json.dumps(good | {rng.choice(_FIELDS): rng.choice(_WRONG)}).encode())
    if kind == 1:
        value = rng.choice([1, "x", None, [], _HTML, *_PATHS])
        return post(json.dumps(good | {rng.choice(_UNKNOWN): value}).encode())
    if kind == 2:
        name = rng.choice(("num_frames", "num_inference_steps", "guidance_scale", "fps"))
        bad = [n for n in _NUMBERS if name != "guidance_scale" or n not in (0, 1.5)]
        return post(json.dumps(good | {name: rng.choice(bad)}).encode())
    if kind == 3:
        sizes = ("0x0", "-1x1", "1x", "x", "99999x99999", "96×160", "96x160x3", "7x7", _HTML)
        return post(json.dumps(good | {"size": rng.choice(sizes)}).encode())
    if kind == 4:
        prompts = ("", " ", "\0", "\ud800", "a" * 20_001, None, 1, ["a"], "a\0b")
        return post(json.dumps(good | {"prompt": rng.choice(prompts)}).encode())
    if kind == 5:  # not JSON
        text = json.dumps(good)
        cut = text[: rng.randrange(len(text))]
        wrong = (
            "[]",
            "null",
            "1",
            '"x"',
            "{" * 3000,
            "[" * 3000,
            cut,
            text + "x",
            text[:-1] + ",}",
        )
        wrong += (
            '{"prompt":"a","prompt":"b"}',
            '{"prompt":NaN}',
            "\ufeff" + text,
            "'x'",
            cut + "\0",
        )
        return post(rng.choice(wrong).encode())
    if kind == 6:  # random bytes
        return post(rng.randbytes(rng.randrange(1, 3000)))
    if kind == 7:
        kinds = ("text/plain", "application/x-www-form-urlencoded", "text/html", "", "a" * 999)
        return post(json.dumps(good).encode(), rng.choice(kinds))
    big = {"prompt": "a", "negative_prompt": "b" * rng.choice((30_000, 600_000, 3_000_000))}
    return post(json.dumps(big).encode())


def wrong_form(rng: random.Random) -> Raw:
    """A form with one thing wrong."""
    prompt = part("prompt", b"a red circle moves left")
    kind = rng.randrange(9)
    if kind == 0:
        return form([prompt, part(rng.choice(_UNKNOWN[6:]).replace("\0", "x"), b"1")])
    if kind == 1:
        names = rng.choice((*_PATHS, "a\r\nX: y", "a" * 5000, _HTML, "\udcff"))
        sizes = rng.choice((0, 10, 100_000))
        return form([prompt, part("input_reference", rng.randbytes(sizes), names)])
    if kind == 2:
        return form([part("prompt", b"x", "prompt.txt")])
    if kind == 3:
        return form([prompt, prompt])
    if kind == 4:
        name = rng.choice(("num_frames", "num_inference_steps", "seed"))
        wrong = rng.choice((b"x", b"", b"1.5", b"1e3", b"\xff", b"-1", b"9" * 40, b"true"))
        return form([prompt, part(name, wrong)])
    if kind == 5:
        parts = [part(f"x{i}", b"1") for i in range(rng.choice((1, 50, 5000)))]
        return form([prompt, *parts])
    whole = form([prompt]).partition(b"\r\n\r\n")[2]
    if kind == 6:  # cut
        return post(whole[: rng.randrange(20, len(whole) - 30)], "multipart/form-data; boundary=BB")
    if kind == 7:
        wrong = rng.choice(("", "; boundary=", "; boundary=CC", f"; boundary={'B' * 300}", ";;;"))
        return post(whole, f"multipart/form-data{wrong}")
    return form([prompt, part("input_reference", b"x" * rng.choice((17 << 20, 20 << 20)), "a.png")])


def part(name: str, value: bytes, filename: str | None = None) -> bytes:
    file = "" if filename is None else f'; filename="{filename}"'
    head = f'Content-Disposition: form-data; name="{name}"{file}\r\n\r\n'
    return b"--BB\r\n" + head.encode("utf-8", "surrogateescape") + value + b"\r\n"


def form(parts: Iterable[bytes]) -> Raw:
    return post(b"".join(parts) + b"--BB--\r\n", "multipart/form-data; boundary=BB")


def body(rng: random.Random) -> Raw:
    return wrong_json(rng) if rng.random() < 0.6 else wrong_form(rng)


def path(rng: random.Random) -> Raw:
    """A path that leads nowhere, out of the folder, or to another method."""
    parts = ("..", "%2e%2e", "%2e%2e%2f", "..%5c", "%00", "etc", "passwd", "content", "videos")
    parts += ("v1", ".", "~root", "job.json", "static", _HTML.replace(" ", "%20"), "%ff", "\udcff")
    parts += ("video_0123456789abcdef", "video_" + "0" * 15 + "%2f", "a" * 3000, "*", "%", "%u0041")
    tail = "/".join(rng.choice(parts) for _ in range(rng.randrange(1, 8)))
    start = rng.choice(("/v1/videos/", "/cards/", "/v1/models/", "//", "/%2e%2e/", "/v1/"))
    methods = ("GET", "DELETE", "PUT", "PATCH", "POST", "HEAD", "TRACE", "OPTIONS", "CONNECT", "X")
    line = f"{rng.choice(methods)} {start}x{tail} HTTP/1.1"
    lines = [line, "Host: localhost", "Connection: close", "Content-Length: 0"]
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape")


def header(rng: random.Random) -> Raw:
    """Headers that are wrong, or that ask for more than they may."""
    wrong = (
        "Host: evil.example", "Host: localhost, evil.example", "Host:", "Origin: null",
        "Origin: http://evil.example", "Origin: http://localhost.evil.example",
        "Sec-Fetch-Site: cross-site", "Content-Length: -1", "Content-Length: 1, 2",
        "Content-Length: 99999999999999999999", "Transfer-Encoding: gzip",
        "Transfer-Encoding: chunked, chunked", "X: " + "a" * 70_000, "X y: z", "\0: x",
        "X: a\0b", ": x", " folded", "Expect: 200-ok", "Content-Encoding: gzip",
    )  # fmt: skip
    lines = ["POST /v1/videos HTTP/1.1", "Connection: close", "Content-Type: application/json"]
    line = rng.choice(wrong)
    lines += [line] if line.startswith("Host") else ["Host: localhost", line]
    lines += [] if "Length" in line or "Transfer" in line else ["Content-Length: 2"]
    return "\r\n".join([*lines, "", "{}"]).encode()


def line(rng: random.Random) -> Raw:
    """No HTTP, or nearly."""
    lines = (
        b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\r\n\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\nHost: x\n\n", b"A" * 100_000,
        b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        b"Content-Type: application/json\r\n\r\nzz\r\n",
    )  # fmt: skip
    return rng.choice((*lines, rng.randbytes(rng.randrange(1, 2000))))


KINDS: dict[str, Make] = {"body": body, "path": path, "header": header, "line": line}


def send(server: Server, patience: float, raw: Raw) -> str:
    """Sends bytes and says how the answer begins: its status, or "closed" or "silent"."""
    with socket.create_connection((server.host, server.port), timeout=_TIMEOUT) as connection:
        try:
            connection.sendall(raw)
        except OSError:  # closed while we sent
            pass
        try:
            connection.settimeout(patience)
            answer = connection.recv(64)
        except TimeoutError:  # it waits for more
            try:
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(_TIMEOUT)
                answer = connection.recv(64)
            except TimeoutError:
                return "silent"
            except OSError:
                return "closed"
        except OSError:
            return "closed"
    words = answer.split(b" ", 2)
    return words[1].decode("ascii", "replace") if len(words) > 1 else "closed"


def is_good(kind: str, ended: str) -> bool:
    """Whether an answer is as it should be: 4xx, or for what is no request also none."""
    return (len(ended) == 3 and ended[0] == "4") or (kind == "line" and ended == "closed")


def listing(folder: Path, without: Path) -> list[str]:
    """The files of a folder with their times, without those of another folder in it."""
    return sorted(
        f"{path.relative_to(folder)} {path.stat().st_mtime_ns}"
        for path in folder.rglob("*")
        if path.is_file() and without not in path.parents
    )


def run(count: int, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "home").mkdir()
        videos, model, start = folder / "videos", ROOT / "models/toyworld", time.monotonic()
        with Server(
            model,
            videos,
            "--no_worker",
            log=folder / "log",
            cwd=folder,
            TMPDIR=str(folder / "home"),
        ) as server:
            (folder / "log").rename(folder / "old_log")  # the process writes on into the same file
            before = listing(folder, folder / "old_log")
            ended: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
            bad = []
            for kind, make in KINDS.items():
                patience = _PATIENCE if kind == "line" else _TIMEOUT
                raws = [make(random.Random(f"{kind} {seed} {number}")) for number in range(count)]
                with ThreadPoolExecutor(_AT_ONCE) as pool:
                    ends = list(pool.map(functools.partial(send, server, patience), raws))
                for number, (raw, end) in enumerate(zip(raws, ends, strict=True)):
                    ended[kind][end] += 1
                    if not is_good(kind, end):
                        shown = ascii(raw[:400])
                        bad.append({"kind": kind, "case": number, "end": end, "raw": shown})
            alive = server.process.poll() is None and server.ask("GET", "/healthz").status == 200
            memory = _peak_bytes(server.process.pid)
            jobs = len(server.ask("GET", "/v1/videos").json["data"])
            log = (folder / "old_log").read_text()
            after = listing(folder, folder / "old_log")
    return {
        "seconds": round(time.monotonic() - start, 1),
        "ended": {kind: dict(sorted(ends.items())) for kind, ends in ended.items()},
        "bad": len(bad),
        "some_bad": bad[:10],
        "alive": alive,
        "jobs": jobs,
        "written": [line for line in after if line not in before and "log " not in line],
        "defects": log.count("Traceback"),
        "peak_mib": memory >> 20,
        "peak_is_bounded": memory < _MEMORY,
    }


def _peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def is_right(report: dict[str, Any]) -> bool:
    wrong = report["bad"] or report["jobs"] or report["written"] or report["defects"]
    return bool(report["alive"] and report["peak_is_bounded"] and not wrong)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=500, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    report = run(arguments.count, arguments.seed)
    print(json.dumps(report, indent=2))
    sys.exit(0 if is_right(report) else 1)


if __name__ == "__main__":
    main()
