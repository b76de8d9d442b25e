"""Clients trained by several processes at once, each with its own model."""

import multiprocessing
import os
import signal
import time
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
from torch.testing import assert_close

from fedlora.api import run
from fedlora.config.experiment import build
from fedlora.errors import RunStopped, UserError
from fedlora.train.devices import MultiDeviceTrainer, TrainerProcess, balance
from fedlora.train.hardware import devices
from fedlora.train.local import LocalTrainer
from tiers import slow

from wired import assert_same_runs, furnish, problem


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("devices"))


def experiment(home, method: str, **train: Any):
    table = problem(home, method)
    return build({**table, "train": {**table["train"], **train}})


@pytest.mark.parametrize("method", slow(["flora", "ditto", "ce-lora"], "flora"))
def test_a_run_on_two_devices_is_that_on_one_and_leaves_no_process(home, tmp_path, method):
    """Base updates reach every device, penalties travel, features are seen; single clients, so that no sum is in
    another order."""
    before = set(multiprocessing.active_children())
    for count in (1, 2):
        run(experiment(home, method, devices=count), tmp_path / str(count))
    assert_same_runs(tmp_path / "1", tmp_path / "2")
    until = time.monotonic() + 30
    while (left := set(multiprocessing.active_children()) - before) and time.monotonic() < until:
        time.sleep(0.05)
    assert not left


@pytest.mark.parametrize(
    ("costs", "count", "expected"),
    [
        ([5, 1, 4, 2], 2, [[0, 1], [2, 3]]),
        ([3, 3, 3], 2, [[0, 2], [1]]),
        ([7], 3, [[0], [], []]),
        ([], 2, [[], []]),
        ([9, 1, 1, 1, 1, 1, 1], 3, [[0], [1, 3, 5], [2, 4, 6]]),
    ],
)
def test_the_work_is_shared_out_evenly(costs, count, expected):
    assert balance(costs, count) == expected


class Stub:
    """Stands for a trainer: its calls show where they were answered."""

    def __init__(self, offset: int) -> None:
        self.offset = offset

    def scores(self, asked: Any) -> list[Any]:
        return [self._answer(one) for one in asked]

    def _answer(self, one: Any) -> Any:
        if one == "fail":
            raise ValueError(f"fails at {self.offset}")
        if one == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return one + self.offset


@pytest.fixture(scope="module")
def process():
    return TrainerProcess("the other one", Stub, 100)


@pytest.mark.slow
def test_a_process_answers_with_what_its_trainer_gives_or_raises(process):
    sent = [
        torch.randn(2, 3),
        torch.tensor(1),
        torch.zeros(0, 2),
        torch.tensor([True]),
        torch.ones(2, dtype=torch.bfloat16),
    ]
    process.start_call("scores", sent)
    for one, back in zip(sent, process.result(), strict=True):
        assert_close(back, one + 100)
        assert back.dtype == (one + 100).dtype
    process.start_call("scores", ["fail"])
    with pytest.raises(ValueError, match="fails at 100"):
        process.result()
    process.start_call("scores", [1])
    assert process.result() == [101]


@pytest.mark.slow
def test_a_process_that_dies_stops_the_run_and_is_named():
    process = TrainerProcess("the other one", Stub, 100)
    process.start_call("scores", ["die"])
    with pytest.raises(RunStopped, match="the process for the other one ended with exit code -9"):
        process.result()
    with pytest.raises(RunStopped, match="the other one ended"):
        process.start_call("scores", [1])
        process.result()


@pytest.mark.slow
def test_after_a_failure_on_one_device_the_next_answers_are_not_the_last_ones(process):
    here = create_autospec(LocalTrainer, instance=True)
    here.scores.side_effect = Stub(0).scores
    both = MultiDeviceTrainer(here, [process])
    share = both._distribute
    with pytest.raises(ValueError, match="fails at 0"):
        share("scores", ["fail", 1], [2, 1])
    with pytest.raises(ValueError, match="fails at 100"):
        share("scores", [1, "fail"], [2, 1])
    assert share("scores", [1, 2, 3], [3, 2, 1]) == [1, 102, 103]


def test_devices_that_are_not_there_are_refused(monkeypatch):
    assert devices("cpu", "auto") == 1  # one CPU
    monkeypatch.setattr("fedlora.train.hardware.device", lambda choice: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices("cuda", "auto") == 2
    assert devices("cuda:1", "auto") == 1
    with pytest.raises(UserError, match=r"train\.devices = 3: only 2 are available"):
        devices("cuda", 3)
    with pytest.raises(UserError, match=r"'cuda:1' is one device; for train\.devices = 2, set train\.device = 'cuda'"):
        devices("cuda:1", 2)
