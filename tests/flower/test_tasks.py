"""Kinds of tasks over Flower."""

import json

import pytest
import tomli_w

from fedlora.api import run
from fedlora.config.experiment import build
from tiny_causal import language_model
from tiny_images import tiny_npz, tiny_vit
from tiny_lm import CHATML, pair_rows, tiny_lm
from tiny_seq2seq import pair_rows as answered_rows
from tiny_seq2seq import tiny_seq2seq

from lives import fedlora, table
from tiny import LABELS
from wired import assert_same_runs, furnish

pytestmark = [pytest.mark.flower, pytest.mark.timeout(600)]


def regression(home):
    """Scores in place of the labels."""
    return changed(home, lambda row: {**row, "label": LABELS.index(row["label"]) + 0.5}) | {"task": "regression"}


def tagging(home):
    """The words of a text, with the label as an entity of two words."""

    def tagged(row):
        words, entity = row["text"].split(), row["label"]
        return {"tokens": words, "tags": [f"B-{entity}", f"I-{entity}", *["O"] * (len(words) - 2)]}

    return changed(home, tagged) | {"task": "tagging"}


def multiple_choice(home):
    """The text as a question, with the names of the labels as options."""
    language_model(home / "gpt2", "gpt2")
    names = {name: name for name in ("prompt", "options", "answer")}
    found = changed(home, lambda row: {"prompt": row["text"], "options": [*LABELS], "answer": row["label"]}, **names)
    return found | {"task": "multiple-choice", "model": str(home / "gpt2")}


def image_classification(home):
    """Images, which are mirrored at random."""
    tiny_vit(home / "vit")
    task = {"kind": "image-classification", "augment": "flip"}
    return {"task": task, "model": str(home / "vit"), "data": {"source": str(tiny_npz(home / "rows.npz", 48))}}


def causal_lm(home):
    """Conversations, with generated answers."""
    tiny_lm(home / "lm", template=CHATML)
    pair_rows(home / "chats.jsonl", 24)
    data = {"source": str(home / "chats.jsonl"), "messages": "messages"}
    evaluate = {"generate": 2, "max_new_tokens": 4}
    return {"task": "causal-lm", "model": str(home / "lm"), "data": data, "evaluate": evaluate}


def seq2seq(home):
    """Prompts with answers, and generated answers."""
    data = {"source": str(answered_rows(home / "pairs.jsonl", 40)), "prompt": "prompt", "response": "response"}
    evaluate = {"generate": 4, "max_new_tokens": 4}
    return {"task": "seq2seq", "model": str(tiny_seq2seq(home / "t5", "t5")), "data": data, "evaluate": evaluate}


def changed(home, form, **columns):
    """The texts with labels in another form."""
    rows = [json.loads(line) for line in (home / "rows.jsonl").read_text().splitlines()]
    (home / "rows.jsonl").write_text("\n".join(json.dumps(form(row)) for row in rows))
    return {"data": {"source": str(home / "rows.jsonl"), **columns}}


KINDS = {
    "tagging": (tagging, "f1"),
    "causal-lm": (causal_lm, "loss"),
    "regression": (regression, "pearson"),
    "multiple-choice": (multiple_choice, "acc_norm"),
    "image-classification": (image_classification, "accuracy"),
    "seq2seq": (seq2seq, "loss"),
}
"""Each kind's settings, and its main metric."""
FAST = ("tagging", "causal-lm")


@pytest.mark.parametrize("kind", [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.full) for kind in KINDS])
def test_over_flower_a_task_is_bit_for_bit_the_simulated_one(tmp_path, kind):
    settings, metric = KINDS[kind]
    home = furnish(tmp_path)
    train = {"batch_size": 8, "max_length": 32, "lr": 1e-2, "device": "cpu", "clients_per_step": 1}
    what = {**table(home, 2, rounds=2, train=train), **settings(home)}
    file, path = tmp_path / "experiment.toml", tmp_path / "run"
    file.write_text(tomli_w.dumps(what))
    process = fedlora("deploy", "local", "--clients", "2", file, "--out", path)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert metric in out
    simulated = run(build(what), tmp_path / "simulated").folder
    assert_same_runs(simulated, path)
    samples = [folder / "samples/round-2.jsonl" for folder in (simulated, path)]
    assert [file.exists() for file in samples] == [kind in ("causal-lm", "seq2seq")] * 2
    assert not samples[0].exists() or samples[0].read_text() == samples[1].read_text()
