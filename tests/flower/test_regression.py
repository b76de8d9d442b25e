"""A regression over Flower."""

import pytest
import tomli_w

from fedlora.api import run
from fedlora.config.experiment import build

from lives import fedlora, table
from tiny import LABELS
from wired import assert_same_runs, furnish

pytestmark = [pytest.mark.flower, pytest.mark.timeout(600)]


def test_over_flower_a_regression_is_bit_for_bit_the_simulated_one(tmp_path):
    home = furnish(tmp_path)
    rows = (home / "rows.jsonl").read_text()
    for score, label in enumerate(LABELS):
        rows = rows.replace(f'"{label}"', str(score + 0.5))
    (home / "rows.jsonl").write_text(rows)
    what = table(home, 2, rounds=2, task="regression")
    file, path = tmp_path / "experiment.toml", tmp_path / "run"
    file.write_text(tomli_w.dumps(what))
    process = fedlora("deploy", "local", "--clients", "2", file, "--out", path)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "pearson" in out
    assert_same_runs(run(build(what), tmp_path / "simulated").folder, path)
