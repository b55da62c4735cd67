"""Stop requests for threads other than the main thread; they check between long steps.

A signal interrupts only the main thread, and a process ends only after its other threads.
"""

import threading

asked = threading.Event()


class Stopping(Exception):
    """The process is ending; nobody waits for the result."""


def check() -> None:
    """Stops the calling thread's work if the process was asked to end.

    Raises:
        Stopping: the process was asked to end.
    """
    if asked.is_set():
        raise Stopping
