"""Errors that a script reports in one line, without a traceback.

`runtime.exit_codes` turns them into exit codes: InputError 2, RunError 1, Stopped 130 or 143.
"""

import contextlib
import signal
from collections.abc import Iterator

from runtime import processes


class InputError(ValueError):
    """Bad usage or input. The message is one line for the user."""


class RunError(RuntimeError):
    """The run failed for a reason that the user can understand without a traceback."""


class Stopped(BaseException):
    """The process received SIGINT or SIGTERM."""

    def __init__(self, number: int):
        super().__init__("interrupted" if number == signal.SIGINT else "terminated")
        self.number = number


@contextlib.contextmanager
def checking_input() -> Iterator[None]:
    """Turns a ValueError raised by an input check into an InputError.

    With several processes, all of them raise as soon as one of them does.

    Raises:
        InputError: a check in this or in another process failed.
    """
    refusal = None
    try:
        yield
    except ValueError as error:
        refusal = error
    refusals = processes.exchange("" if refusal is None else str(refusal))
    for process, message in enumerate(refusals):
        if message:
            raise InputError(f"process {process}: {message}" if process else message) from refusal
