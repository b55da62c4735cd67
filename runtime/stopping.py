"""Whether this process was asked to end: threads beside the main one look between long steps.

A signal interrupts the main thread only, and the end of a process waits for its other threads.
"""

import threading

asked = threading.Event()


class Stopping(Exception):
    """The process is ending; nobody waits for the result."""


def check() -> None:
    """Ends the calling thread's work if the process was asked to end.

    Raises:
        Stopping: it was.
    """
    if asked.is_set():
        raise Stopping
