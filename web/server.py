"""Starts the server: checks first, then listens, then starts the worker."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
import stat
from collections.abc import Sequence
from pathlib import Path

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from cogvideox.model.folder import MODEL_PARTS, find_model
from jobs.jobfile import Parse
from runtime.errors import InputError, checking_input
from runtime.files import open_regular
from runtime.text import printable
from stages import files
from web.access import is_loopback, unsafe_to_listen
from web.app import make_app
from web.store import Store
from web.worker import Worker

_HEADER_SECONDS = 20.0  # for the first request of a connection
_MAX_HEADER_BYTES = 32 << 10
_MAX_CONNECTIONS = 512
_GRACEFUL_SECONDS = 5
_KEY_LENGTHS = (16, 512)
_MAX_KEY_BYTES = 4096


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """Options of serve.py, by the names of the command line.

    Attributes:
        port: 0 takes a free one.
        api_key_file: its first line is the key; None asks for none.
        allow_anyone: listen to other machines without a key.
        max_queue: requests that may wait.
        lora_dir: holds the LoRA files that requests may name.
        no_worker: only accept; workers of other processes make the videos.
    """

    output_dir: Path
    model_id: str
    host: str
    port: int
    api_key_file: Path | None
    allow_anyone: bool
    max_queue: int
    no_worker: bool
    lora_dir: Path | None = None


def run(options: ServeOptions, parse: Parse, worker_command: Sequence[str]) -> None:
    """Serves until SIGTERM or SIGINT.

    Args:
        parse: checks the settings of a video.
        worker_command: starts a worker on the same folder.

    Raises:
        InputError: an option is wrong, or the port is taken.
    """

    def wake() -> None:
        if worker:
            worker.wake()

    with checking_input():
        key = read_key(options.api_key_file) if options.api_key_file else None
        unsafe = unsafe_to_listen(options.host, key is not None, options.allow_anyone)
        if unsafe:
            raise InputError(unsafe)
        files.check_output_folder(options.output_dir)
        if options.lora_dir and not options.lora_dir.is_dir():
            raise InputError(f"--lora_dir {options.lora_dir} is not a folder")
        model = find_model(options.model_id, MODEL_PARTS)
        listening = _listen(options.host, options.port)
        # A path of this machine is no client's business.
        name = Path(options.model_id).name if os.path.isdir(options.model_id) else options.model_id
        limits = (options.max_queue, options.lora_dir)
        store = Store(options.output_dir, model, name, parse, *limits, wake)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    worker = None
    if not options.no_worker:
        worker = Worker(worker_command, options.output_dir, store.fail)
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {name} on http://{shown}:{port}, videos in {options.output_dir}", flush=True)
    app = make_app(store, worker, key, is_loopback(options.host))
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_MAX_CONNECTIONS,
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        timeout_graceful_shutdown=_GRACEFUL_SECONDS,
    )
    uvicorn.Server(config).run(sockets=[listening])


def read_key(path: Path) -> str:
    """Reads the key from the first line of a file that others cannot read.

    Raises:
        InputError: the file cannot be read, others can read it, or the key is too short or long.
    """
    shown = printable(str(path))
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_mode & (stat.S_IRGRP | stat.S_IROTH):
            raise InputError(f"--api_key_file {shown} can be read by others; run chmod 600 on it")
        content = file.read(_MAX_KEY_BYTES)
    key = content.decode("ascii", errors="replace").partition("\n")[0].strip()
    shortest, longest = _KEY_LENGTHS
    if not key.isascii() or not key.isprintable() or not shortest <= len(key) <= longest:
        raise InputError(
            f"--api_key_file {shown}: its first line is not a key of {shortest} to {longest} "
            "ASCII characters"
        )
    return key


def _listen(host: str, port: int) -> socket.socket:
    """Opens the server's socket.

    Raises:
        ValueError: the host is unknown or not of this machine, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        # Clients that come before the server is ready wait instead of being refused.
        listening.listen(_MAX_CONNECTIONS)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host {host} --port {port}: {error}") from error
    return listening


class _Protocol(H11Protocol):
    """Ends connections whose first request does not come in time; uvicorn waits for ever."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        asyncio.get_running_loop().call_later(_HEADER_SECONDS, self._end_if_silent)

    def _end_if_silent(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()
