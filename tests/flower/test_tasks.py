"""Kinds of tasks over Flower."""

import json

import pytest
import tomli_w

from fedlora.api import run
from fedlora.config.experiment import build
from tiny_causal import language_model

from lives import fedlora, table
from tiny import LABELS
from wired import assert_same_runs, furnish

pytestmark = [pytest.mark.flower, pytest.mark.timeout(600)]


def tagged(row):
    """The words of a text, with the label as an entity of two words."""
    words, entity = row["text"].split(), row["label"]
    return {"tokens": words, "tags": [f"B-{entity}", f"I-{entity}", *["O"] * (len(words) - 2)]}


def chosen(row):
    """The text as a question, with the names of the labels as options."""
    return {"prompt": row["text"], "options": [*LABELS], "answer": row["label"]}


KINDS = {
    "tagging": ("f1", tagged, "bert"),
    "multiple-choice": ("acc_norm", chosen, "gpt2"),
}
"""The main metric of each kind, its form of a text with a label, and its model."""


@pytest.mark.parametrize("kind", KINDS)
def test_over_flower_a_task_is_bit_for_bit_the_simulated_one(tmp_path, kind):
    metric, form, model = KINDS[kind]
    home = furnish(tmp_path)
    if model != "bert":
        language_model(home / model, model)
    rows = [json.loads(line) for line in (home / "rows.jsonl").read_text().splitlines()]
    (home / "rows.jsonl").write_text("\n".join(json.dumps(form(row)) for row in rows))
    data = {"source": str(home / "rows.jsonl"), "prompt": "prompt", "options": "options", "answer": "answer"}
    train = {"batch_size": 8, "max_length": 32, "lr": 1e-2, "device": "cpu", "clients_per_step": 1}
    what = table(home, 2, rounds=2, task=kind, model=str(home / model), data=data, train=train)
    file, path = tmp_path / "experiment.toml", tmp_path / "run"
    file.write_text(tomli_w.dumps(what))
    process = fedlora("deploy", "local", "--clients", "2", file, "--out", path)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert metric in out
    assert_same_runs(run(build(what), tmp_path / "simulated").folder, path)
