"""The memory of a process and of all that it started, and the line in which it reports its results."""

import json
import os
import threading
import time
from pathlib import Path


class Memory(threading.Thread):
    """Watches what this process and all that it started have in memory, shared pages counted once."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_mb = 0.0
        self.start()

    def run(self) -> None:
        """Looks twice a second."""
        while True:
            self.peak_mb = max(self.peak_mb, sum(map(_mb, _family())))
            time.sleep(0.5)


def _family() -> list[int]:
    """This process and its descendants."""
    parents = {}
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            parents[int(pid)] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    family = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return list(family)


def _mb(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1000 for line in lines if line.startswith("Pss:")), 0.0)


def say(**found: float) -> None:
    """The last line that a measured process prints."""
    print(json.dumps(found), flush=True)
