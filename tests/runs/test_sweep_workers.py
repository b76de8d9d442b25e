"""Processes of a sweep that loses its own process."""

import os
import threading
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
from filelock import FileLock

from fedlora import Result, sweeping
from fedlora.config.sweep import Sweep
from fedlora.report.sweep_progress import NullSweepProgress
from fedlora.reuse import Reuse
from fedlora.runs.lock import LOCK
from fedlora.runs.sweep_plan import Outcome, SweepPlan
from fedlora.sweep_workers import Worker


def endless(run, path, *_):
    """In place of a run."""
    (path / "pid").write_text(str(os.getpid()))
    time.sleep(600)


def sweep_process(path):
    """A process with a worker that never ends its run."""
    worker = Worker(0, 1, endless, None)
    worker.start(SweepPlan(Sweep.load({})).ready({})[0], path)
    time.sleep(600)


def ends(pid: str) -> bool:
    """Whether the process ends within 20 seconds; one that is no longer waited for may remain as a zombie."""
    for _ in range(200):
        state = Path("/proc", pid, "stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
def test_a_worker_ends_with_the_process_of_its_sweep(tmp_path):
    sweep = get_context("spawn").Process(target=sweep_process, args=(tmp_path,))
    sweep.start()
    pid = tmp_path / "pid"
    while not pid.exists() or not pid.read_text():
        assert sweep.is_alive()
        time.sleep(0.1)
    sweep.kill()
    sweep.join()
    assert ends(pid.read_text())


@pytest.mark.parametrize("begun", [False, True])
def test_a_resumed_sweep_waits_for_a_process_that_still_holds_a_run(begun, tmp_path, monkeypatch):
    monkeypatch.setattr(sweeping, "finish_run", lambda *_: Result(tmp_path, "fedit", [], {}))
    run = SweepPlan(Sweep.load({})).ready({})[0]
    if begun:
        (tmp_path / "experiment.toml").write_text(run.experiment.to_toml())
    locked = threading.Event()

    def other():
        with FileLock(tmp_path / LOCK):  # a process that is ended releases it without removing the directory
            locked.set()
            time.sleep(0.3)

    threading.Thread(target=other).start()
    assert locked.wait(10)
    assert sweeping.execute(run, tmp_path, None, NullSweepProgress(), Reuse()) == Outcome()
