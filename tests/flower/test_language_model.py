"""A language model over Flower."""

import pytest
import tomli_w

from fedlora.api import run
from fedlora.config.experiment import build
from tiny_lm import CHATML, pair_rows, tiny_lm

from lives import fedlora, table
from wired import assert_same_runs

pytestmark = [pytest.mark.flower, pytest.mark.timeout(600)]


def test_over_flower_a_language_model_is_bit_for_bit_the_simulated_one(tmp_path):
    tiny_lm(tmp_path / "bert", template=CHATML)  # where `table` expects the model
    pair_rows(tmp_path / "rows.jsonl", 24)
    data = {"source": str(tmp_path / "rows.jsonl"), "messages": "messages"}
    evaluate = {"generate": 2, "max_new_tokens": 4}
    what = table(tmp_path, 2, rounds=2, task="causal-lm", data=data, evaluate=evaluate)
    file, path = tmp_path / "experiment.toml", tmp_path / "run"
    file.write_text(tomli_w.dumps(what))
    process = fedlora("deploy", "local", "--clients", "2", file, "--out", path)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "loss" in out and (path / "samples/round-2.jsonl").is_file()
    simulated = run(build(what), tmp_path / "simulated").folder
    assert_same_runs(simulated, path)
    assert (simulated / "samples/round-2.jsonl").read_text() == (path / "samples/round-2.jsonl").read_text()
