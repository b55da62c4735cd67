"""How a script ends: its exit code, its last line, and soon.

0 done, 1 failed, 2 bad usage or input, 3 some jobs of a batch failed, 130 interrupted, 143
terminated.
"""

from __future__ import annotations

import atexit
import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from runtime import processes, stopping
from runtime.errors import InputError, RunError, Stopped
from runtime.text import message_line

FAILED_JOBS = 3

if TYPE_CHECKING:
    from sys import UnraisableHookArgs


def run_script(main: Callable[[], None]) -> NoReturn:
    """Runs `main` as `run_main` does, and ends the process without Python's teardown.

    Freeing the modules and objects of torch and JAX one by one takes up to 2.4 s.
    """
    code = 1  # of a traceback

    def leave() -> None:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except (OSError, ValueError):  # closed, or a full disk
            os._exit(code or 1)
        os._exit(code)

    # The callback that is registered first runs last, after those of JAX and of multiprocessing.
    atexit.register(leave)
    try:
        run_main(main)
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        raise


def run_main(main: Callable[[], None]) -> NoReturn:
    """Runs a script's `main` and exits with the project's codes.

    Bad input, failures that a user can understand, and signals end in one line on stderr. Any other
    exception is a defect and shows its traceback.
    """
    # Both signals raise, so that a terminated run removes its temporary files.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    sys.unraisablehook = _stop_again
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A log file shows lines as they happen, and any encoding shows any prompt.
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        main()
        processes.finish()
    except BrokenPipeError:  # as in `| head -1`
        _end_unread()
    except InputError as error:
        _end(2, "error: ", " ".join(str(error).split()))
    except (RunError, FloatingPointError, processes.OtherProcessFailed) as error:
        _end(1, "failed: ", str(error))
    except Stopped as stopped:
        _end(128 + stopped.number, "", str(stopped))
    except Exception as error:
        processes.fail(f"{type(error).__name__}: {error}")
        raise
    sys.exit(0)


def _end(code: int, kind: str, reason: str) -> NoReturn:
    """Exits; prints the reason on stderr and sends it to the other processes."""
    print(f"{kind}{message_line(reason)}", file=sys.stderr)
    processes.fail(reason)
    sys.exit(code)


def _end_unread() -> NoReturn:
    """Exits after the reader of stdout or stderr closed it, with whichever of them is left."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)  # Python flushes stdout once more at exit
    try:
        _end(1, "failed: ", "the reader of the output closed it")
    except BrokenPipeError:
        os.dup2(null, 2)
        sys.exit(1)


def _stop(number: int, _: object) -> NoReturn:
    stopping.asked.set()
    raise Stopped(number)


def _stop_again(unraisable: UnraisableHookArgs) -> None:
    """Raises a signal again whose exception Python dropped.

    Python drops exceptions in garbage collection callbacks, and JAX registers one: about half of
    all signals were lost there while stage 2 started.
    """
    if isinstance(unraisable.exc_value, Stopped):
        number = unraisable.exc_value.number
        threading.Timer(0.05, signal.raise_signal, (number,)).start()
    else:
        sys.__unraisablehook__(unraisable)
