"""Starts servers in processes of their own and asks them."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
ONE_DEVICE = ("--dp=1", "--sp=1", "--tp=1")
_SERVING = re.compile(r"serving \S+ on http://(\S+?):(\d+),")


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Server:
    """A server process; `with` ends it."""

    def __init__(
        self,
        model: Path,
        folder: Path,
        *more: str,
        log: Path | None = None,
        cwd: Path = ROOT,
        **environment: str,
    ):
        """
        Args:
            more: arguments of serve.py beside the model, the folder and the port.
            cwd: where the server starts.
            environment: of the server, beside this process's.
        """
        self.folder = folder
        self.log = log or folder.parent / f"{folder.name}.log"
        common = ["--dtype=float32", "--num_inference_steps=2", "--port=0", *ONE_DEVICE]
        command = [
            sys.executable,
            str(ROOT / "serve.py"),
            f"--output_dir={folder}",
            f"--model_id={model}",
        ]
        environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        start = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "a") as file:
            self.process = subprocess.Popen(
                [*command, *common, *more],
                cwd=cwd,
                env=os.environ | environment,
                stdout=file,
                stderr=file,
            )
        while not (found := _SERVING.search(self.log.read_text()[start:])):
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)
        self.host, self.port = found[1], int(found[2])

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | dict[str, Any] | None = None,
        **headers: str,
    ) -> Answer:
        """Sends one request; underscores in the names of headers stand for hyphens."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if isinstance(body, dict):
            body = json.dumps(body).encode()
            sent.setdefault("content-type", "application/json")
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        try:
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            got = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, got, answer.read())
        finally:
            connection.close()

    def create(self, prompt: str = "a red circle moves left", **fields: Any) -> dict[str, Any]:
        answer = self.ask("POST", "/v1/videos", {"prompt": prompt, **fields})
        assert answer.status == 200, answer.body
        return answer.json

    def wait(self, id_: str, *statuses: str) -> dict[str, Any]:
        """Polls a video until it has one of the statuses, by default until it is completed."""
        while True:
            video = self.ask("GET", f"/v1/videos/{id_}").json
            if video["status"] in (statuses or ("completed",)):
                return video
            assert video["status"] != "failed", video
            time.sleep(0.05)

    def kill(self) -> None:
        """Kills the server with SIGKILL; its worker follows."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
        if error is not None:
            print(self.log.read_text()[-4000:])
