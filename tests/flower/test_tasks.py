"""Kinds of tasks over Flower."""

import pytest
import tomli_w

from fedlora.api import run
from fedlora.config.experiment import build
from tiny_tasks import tiny_task

from lives import fedlora, table
from wired import assert_same_runs

pytestmark = [pytest.mark.flower, pytest.mark.timeout(600)]


METRICS = {
    "tagging": "f1",
    "causal-lm": "loss",
    "regression": "pearson",
    "multiple-choice": "acc_norm",
    "image-classification": "accuracy",
    "seq2seq": "loss",
}
"""Each kind's main metric; all other tests over Flower classify."""
FAST = ("tagging", "causal-lm")


@pytest.mark.parametrize("kind", [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.full) for kind in METRICS])
def test_over_flower_a_task_is_bit_for_bit_the_simulated_one(tmp_path, kind):
    train = {"batch_size": 8, "max_length": 32, "lr": 1e-2, "device": "cpu", "clients_per_step": 1}
    what = {**table(tmp_path, 2, rounds=2, train=train), **tiny_task(kind, tmp_path / "home")}
    file, path = tmp_path / "experiment.toml", tmp_path / "run"
    file.write_text(tomli_w.dumps(what))
    process = fedlora("deploy", "local", "--clients", "2", file, "--out", path)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert METRICS[kind] in out
    simulated = run(build(what), tmp_path / "simulated").folder
    assert_same_runs(simulated, path)
    samples = [folder / "samples/round-2.jsonl" for folder in (simulated, path)]
    assert [file.exists() for file in samples] == [kind in ("causal-lm", "seq2seq")] * 2
    assert not samples[0].exists() or samples[0].read_text() == samples[1].read_text()
