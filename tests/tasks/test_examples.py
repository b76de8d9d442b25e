"""Batches of encoded examples, and examples without a target."""

from dataclasses import dataclass, replace

import pytest
import torch

from fedlora.api import run
from fedlora.config.experiment import build
from fedlora.errors import UserError
from fedlora.rounds.progress import NullProgress
from fedlora.tasks.classification import Classification
from fedlora.tasks.task import NO_TARGET, Examples

from tiny import LABELS, tiny_bert, tiny_rows

CPU = torch.device("cpu")
TOKENS = [[5, 6, 7], [8], [9, 4]]
TARGETS = [[-100, 1, 2], [-100], [3]]


def flat(lists):
    """The entries of all lists, and the offsets at which the lists begin."""
    return torch.tensor([x for one in lists for x in one]), torch.tensor([0, *map(len, lists)]).cumsum(0)


def examples(left=False):
    """Three examples with a target for any of their tokens."""
    (ids, starts), (targets, target_starts) = flat(TOKENS), flat(TARGETS)
    return Examples({"input_ids": ids}, starts, targets, {"input_ids": 0}, target_starts, left)


def padded(lists, rows, value, left):
    """The lists of these rows, filled to equal length."""
    chosen = [lists[row] for row in rows]
    longest = max(map(len, chosen))
    filled = [[value] * (longest - len(one)) for one in chosen]
    return torch.tensor([b + a if left else a + b for a, b in zip(chosen, filled, strict=True)])


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 1], [1]])
def test_inputs_and_targets_of_a_batch_are_padded_on_the_same_side(rows, left):
    inputs, targets = examples(left).batch(torch.tensor(rows), CPU)
    assert torch.equal(inputs["input_ids"], padded(TOKENS, rows, 0, left))
    assert torch.equal(targets, padded(TARGETS, rows, NO_TARGET, left))


def test_an_input_may_have_several_numbers_for_each_token():
    wide = torch.randn(6, 2, 3)
    inputs, _ = replace(examples(), features={"pixels": wide}, padding={"pixels": 0}).batch(torch.tensor([1, 2]), CPU)
    assert torch.equal(inputs["pixels"][0, 0], wide[3]) and not inputs["pixels"][0, 1].any()
    assert torch.equal(inputs["pixels"][1], wide[4:])


def test_examples_whose_tokens_have_no_target_are_told_from_the_others():
    assert examples().have_targets().tolist() == [True, False, True]
    assert replace(examples(), targets=torch.zeros(3), target_starts=None).have_targets().all()


@dataclass(frozen=True)
class Partly(Classification):
    """Classification in which the first label is no target."""

    def encode(self, tokenizer, columns, max_length):
        found = super().encode(tokenizer, columns, max_length)
        starts = torch.arange(len(found) + 1)
        return replace(found, targets=found.targets.where(found.targets != 0, NO_TARGET), target_starts=starts)

    def made_up(self, texts, classes):
        return {"text": texts, "label": [1] * len(texts)}

    def losses(self, model, inputs, targets):
        return super().losses(model, inputs, targets[:, 0])

    def measure(self, model, inputs, targets, real):
        return super().measure(model, inputs, targets[:, 0], real)


class Notes(NullProgress):
    """Keeps the messages."""

    def __init__(self):
        self.notes = []

    def notify(self, message):
        self.notes.append(message)


def result_of(task, rows, folder, model, monkeypatch, **data):
    """The result of a run of this task, and its notes."""
    for where in ("fedlora.session.task_of", "fedlora.federated_data.task_of"):
        monkeypatch.setattr(where, lambda settings: task)
    notes = Notes()
    settings = {
        "model": str(model),
        "data": {"source": str(rows), "test": str(rows), "user": "user", "labels": list(LABELS), **data},
        "clients": {"partition": "natural", "held_out": 0.0},
        "train": {"batch_size": 64},
        "rounds": 2,
    }
    return run(build(settings), folder, notes), notes.notes


@pytest.mark.slow
def test_examples_without_a_target_are_left_out_counted_and_weigh_nothing(tmp_path, monkeypatch):
    model, whole = tiny_bert(tmp_path / "model"), tiny_rows(tmp_path / "whole.jsonl", 40)
    lines = [line for line in whole.read_text().splitlines() if f'"{LABELS[0]}"' not in line]
    (part := tmp_path / "part.jsonl").write_text("\n".join(lines))
    left_out, notes = result_of(Partly(), whole, tmp_path / "a", model, monkeypatch)
    absent, silent = result_of(Classification(), part, tmp_path / "b", model, monkeypatch)
    count = 40 - len(lines)
    assert notes == [f"{count} of 40 {kind} examples have no target and are left out" for kind in ("training", "test")]
    assert not silent and count
    for ours, theirs in zip(left_out.rows, absent.rows, strict=True):
        assert ours.global_ == pytest.approx(theirs.global_, rel=1e-5)
        assert (ours.train_loss or 0) == pytest.approx(theirs.train_loss or 0, rel=1e-5)
        assert {c: one.weight for c, one in ours.per_client.items()} == {c: o.weight for c, o in theirs.per_client.items()}


def test_a_data_set_or_a_client_without_any_target_is_rejected(tmp_path, monkeypatch):
    model, rows = tiny_bert(tmp_path / "model"), tiny_rows(tmp_path / "rows.jsonl", 12)
    lines = rows.read_text().splitlines()
    first = [line for line in lines if f'"{LABELS[0]}"' in line]
    rows.write_text("\n".join(first * 2))
    with pytest.raises(UserError, match="none of the 8 training examples has a target"):
        result_of(Partly(), rows, tmp_path / "a", model, monkeypatch)
    rows.write_text("\n".join(lines + [line.replace('"user": "u', '"user": "v') for line in first * 2]))
    with pytest.raises(UserError, match=r"client 'v.': none of its training examples has a target"):
        result_of(Partly(), rows, tmp_path / "b", model, monkeypatch)
