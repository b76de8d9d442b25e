"""Processes that end together with another process."""

import os
import select
import threading
from multiprocessing import parent_process


def end_with(pid: int) -> None:
    """Ends this process, regardless of its activity, as soon as process `pid` has ended.

    Flower's own watchdog raises a signal, which a process waiting for an unavailable server was observed to ignore.
    """
    try:
        other = os.pidfd_open(pid)
    except ProcessLookupError:
        os._exit(1)
    _end_when_readable(other)


def end_with_parent() -> None:
    """As `end_with`, for the parent of a process of `multiprocessing`; not limited to Linux."""
    parent = parent_process()
    assert parent is not None, "a process of multiprocessing has a parent"
    _end_when_readable(parent.sentinel)


def _end_when_readable(descriptor: int) -> None:
    def wait() -> None:
        select.select([descriptor], [], [])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
