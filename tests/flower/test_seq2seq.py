"""A sequence-to-sequence model over Flower."""

import json

import pytest
import tomli_w

from fedlora.api import run
from fedlora.config.experiment import build
from tiny_seq2seq import pair_rows, tiny_seq2seq

from lives import fedlora, table
from wired import assert_same_runs

pytestmark = [pytest.mark.flower, pytest.mark.timeout(600)]


def test_over_flower_a_t5_learns_and_answers_bit_for_bit_as_simulated(tmp_path):
    data = {"source": str(pair_rows(tmp_path / "rows.jsonl", 40)), "prompt": "prompt", "response": "response"}
    model, evaluate = str(tiny_seq2seq(tmp_path / "t5", "t5")), {"generate": 4, "max_new_tokens": 4}
    what = {**table(tmp_path, 2, rounds=2, task="seq2seq", evaluate=evaluate), "model": model, "data": data}
    file, path = tmp_path / "experiment.toml", tmp_path / "run"
    file.write_text(tomli_w.dumps(what))
    process = fedlora("deploy", "local", "--clients", "2", file, "--out", path)
    _, err = process.communicate()
    assert process.returncode == 0, err
    simulated = run(build(what), tmp_path / "simulated").folder
    assert_same_runs(simulated, path)
    samples = [folder.joinpath("samples/round-2.jsonl").read_text().splitlines() for folder in (simulated, path)]
    assert samples[0] == samples[1] and len([json.loads(line)["answer"] for line in samples[0]]) == 4
