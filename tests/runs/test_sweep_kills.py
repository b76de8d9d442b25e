"""A sweep that is killed at random instants, and resumed each time."""

import json
import random
import signal
import time

import pytest
import torch

import fedlora

from forks import ended, started
from wired import assert_same_runs, furnish, problem

KILLS = 10


def live(path, table):
    """Begins the sweep or resumes it."""
    torch.set_num_threads(1)
    if (path / "sweep.toml").exists():
        fedlora.sweep(resume=path)
    else:
        fedlora.sweep(table, path)


@pytest.mark.full
@pytest.mark.timeout(0)
def test_a_sweep_killed_at_random_instants_ends_as_if_nothing_had_happened(tmp_path):
    home, rng = furnish(tmp_path), random.Random(0)
    base = {**problem(home), "rounds": 2, "clients": {"count": 3, "partition": "iid", "held_out": 0.3}}
    table = {
        "base": {**base, "lora": {"dropout": 0.1}},
        "seeds": [0, 1],
        "axes": {"method.name": ["fedit", "flora"], "method.rank": [2, 33]},
        "search": {"values": {"train.lr": [1e-2, 3e-2]}},
    }
    began = time.perf_counter()
    assert ended(live, tmp_path / "whole", table) == 0
    seconds, killed = time.perf_counter() - began, 0
    while killed < KILLS:
        process = started(live, tmp_path / "sweep", table)
        process.join(seconds * rng.random() * 0.7)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        killed += 1
        if not (tmp_path / "sweep" / "sweep.json").exists():
            assert not (tmp_path / "sweep" / "runs").exists()
    assert ended(live, tmp_path / "sweep", table) == 0
    one, two = (json.loads((tmp_path / name / "sweep.json").read_text()) for name in ("whole", "sweep"))
    assert one == two
    names = [run["run"] for point in one["points"] for run in point["runs"]]
    assert len(names) == 4
    for name in names:
        assert_same_runs(*(tmp_path / folder / "runs" / name for folder in ("whole", "sweep")))
