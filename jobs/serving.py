"""The worker process of a server: works on the folder's jobs here, or on a Ray cluster."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from typing import TextIO

from cogvideox.model.folder import MODEL_PARTS, ModelFolder, find_model
from jobs.options import BatchOptions
from jobs.service import Service
from runtime.errors import checking_input
from stages import files
from stages.preview import find_factors


def run(options: BatchOptions, parent: TextIO | None) -> None:
    """Serves a folder until SIGTERM or SIGINT, or until the parent process is gone.

    Args:
        parent: a line on it says that a job has come, its end that the parent is gone; None for a
            worker without a parent.

    Raises:
        InputError: there is no such model.
        RunError: the disk is full, or the folder was removed.
    """
    stop, wake = threading.Event(), threading.Event()

    def on_signal(number: int, _: object) -> None:
        stop.set()
        wake.set()

    with checking_input():
        files.check_output_folder(options.output_dir)
        model = find_model(options.model_id, MODEL_PARTS)
        options = _with_previews_if_it_can(options, model)
    if options.engine == "ray":
        from jobs import ray_engine

        ray_engine.connect()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)  # after Ray, which installs handlers of its own
    if parent:
        threading.Thread(target=_listen, args=(parent, wake), daemon=True).start()
    if options.engine == "ray":
        ray_engine.serve(options, stop)
    else:
        Service(model, options, stop, wake).run()


def _with_previews_if_it_can(options: BatchOptions, model: ModelFolder) -> BatchOptions:
    """Turns previews off for a model without factors, unless the user named some."""
    try:
        find_factors(options, model)
    except ValueError as error:
        if options.preview_factors:
            raise
        print(f"without previews: {error}")
        return dataclasses.replace(options, preview_every=None)
    return options


def _listen(parent: TextIO, wake: threading.Event) -> None:
    for _ in parent:
        wake.set()
    # The accelerator must be free for the next server's worker; the records say what is done.
    os._exit(1)
