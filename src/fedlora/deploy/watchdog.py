"""Processes that end with another one."""

import os
import select
import threading


def end_with(pid: int) -> None:
    """Ends this process, whatever it is doing, as soon as that one has ended.

    Flower's own watch raises a signal, which a process that waits for a server that is gone was seen not to heed.
    """
    try:
        other = os.pidfd_open(pid)
    except ProcessLookupError:
        os._exit(1)

    def wait() -> None:
        select.select([other], [], [])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
