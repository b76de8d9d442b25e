"""The experiment's file: read, overridden, refused, written back."""

from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedlora.config.demos import DEMOS
from fedlora.config.experiment import Experiment, build
from fedlora.errors import UserError
from fedlora.methods.table import TABLE

FULL: dict[str, Any] = {
    "model": "some/model",
    "data": {"source": "rows.jsonl", "text": "body", "text_pair": "question", "user": "who", "rows": 9},
    "rounds": 7,
    "clients": {"count": 3, "partition": "natural", "ranks": [4, 4, 4]},
    "method": {"name": "ffa-lora", "rank": 4, "head": "local", "weights": "uniform"},
    "lora": {"targets": ["query", "dense"], "rank_pattern": {r"layer\.0\..*": 2, "a.b": 3}, "rslora": True, "alpha": 0.1},
    "train": {"clip_norm": 1e-3, "optimizer": "sgd"},
    "sampling": {"max_norm": 2.5},
}
NO_MIXED = [name for name, row in TABLE.items() if not row.mixed_ranks]


def saved(folder: Path, table: dict[str, Any]) -> Path:
    path = folder / "experiment.toml"
    path.write_text(tomli_w.dumps(table), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "table", [{}, FULL, *DEMOS.values(), {"lora": {"targets": ".*query"}}, {"data": 'Größe \\ "x".jsonl'}]
)
def test_a_written_experiment_reads_back_as_the_same(table, tmp_path):
    experiment = build(table)
    path = tmp_path / "experiment.toml"
    path.write_text(experiment.to_toml(), encoding="utf-8")
    assert Experiment.load(path) == experiment
    assert Experiment.load(path).to_toml() == experiment.to_toml()


@pytest.mark.parametrize("name", TABLE)
def test_every_method_with_all_its_settings_written_out_reads_back_as_the_same(name, tmp_path):
    experiment = build({"method": {"name": name, **TABLE[name].settings(), "rank": 3}})
    path = tmp_path / "experiment.toml"
    path.write_text(experiment.to_toml(), encoding="utf-8")
    expected = TABLE[name].make(**TABLE[name].fixed_settings, rank=3)
    assert Experiment.load(path).method.make() == experiment.method.make() == expected


def test_an_empty_file_is_the_default_experiment(tmp_path):
    assert Experiment.load(saved(tmp_path, {})) == Experiment()


@pytest.mark.parametrize(
    ("override", "table"),
    [
        ("rounds=9", {"rounds": 9}),
        ("train.lr=0.5", {"train": {"lr": 0.5}}),
        ("method.name=ffa-lora", {"method": {"name": "ffa-lora"}}),
        ("method.name='ffa-lora'", {"method": {"name": "ffa-lora"}}),
        ("lora.rslora=true", {"lora": {"rslora": True}}),
        ('lora.targets=["a", "b"]', {"lora": {"targets": ["a", "b"]}}),
        ("lora.targets=.*=x", {"lora": {"targets": ".*=x"}}),
        ("data.rows=5", {"data": {"rows": 5}}),
        (" train.epochs = 2 ", {"train": {"epochs": 2}}),
    ],
)
def test_an_override_is_what_the_file_could_have_said(override, table):
    assert build({}, [override]) == build(table)


def test_later_overrides_win_and_the_callers_table_stays_as_it_is():
    table: dict[str, Any] = {"train": {"lr": 0.1, "epochs": 4}, "data": "x.csv"}
    changed = build(table, ["train.lr=0.2", "train.lr=0.3", "data.text=body"])
    assert changed == build({"train": {"lr": 0.3, "epochs": 4}, "data": {"source": "x.csv", "text": "body"}})
    assert table == {"train": {"lr": 0.1, "epochs": 4}, "data": "x.csv"}


def test_data_may_be_the_source_alone():
    assert build({"data": "stdlib-docs"}) == build({"data": {"source": "stdlib-docs"}})


@pytest.mark.parametrize(
    ("table", "parts"),
    [
        ({"train": {"lr": -1.0}}, ["train.lr = -1.0", "above 0"]),
        ({"train": {"lr": "fast"}}, ["train.lr = 'fast'", "number"]),
        ({"train": {"optimizer": "adm"}}, ["train.optimizer = 'adm'", "'adamw'"]),
        ({"train": {"label_smoothing": 0.1}}, ["'train.label_smoothing'", "'task.label_smoothing'"]),
        ({"task": {"label_smoothing": 1.0}}, ["task.label_smoothing = 1.0", "below 1"]),
        ({"task": {"class_weights": [1.0, 0.0]}}, ["task.class_weights.1 = 0.0", "above 0"]),
        ({"task": {"kind": "regression", "class_weights": [1.0]}}, ["task.class_weights", "task.kind = 'regression'"]),
        ({"task": {"kind": "image-classification", "crop_padding": -1}}, ["task.crop_padding = -1", "of at least 0"]),
        ({"task": {"crop_padding": 4}}, ["task.crop_padding", "task.kind = 'classification'"]),
        ({"task": {"center": 1.0}}, ["task.center", "task.kind = 'classification'"]),
        ({"task": {"kind": "seq2seq", "separator": " "}}, ["task.separator", "task.kind = 'seq2seq'"]),
        ({"task": {"kind": "multiple-choice", "chat": True}}, ["task.chat", "task.kind = 'multiple-choice'"]),
        (
            {"task": {"kind": "causal-lm", "chat": True}, "data": {"messages": "messages"}},
            ["task.chat", "data.messages"],
        ),
        ({"task": {"kind": "causal-lm", "chat": True}}, ["task.chat", "plain texts (data.text)", "remove it"]),
        ({"task": {"kind": "causal-lm", "separator": " "}}, ["task.separator", "plain texts (data.text)", "remove it"]),
        (
            {"task": {"kind": "causal-lm", "separator": " "}, "data": {"messages": "messages"}},
            ["task.separator", "data.messages", "remove it"],
        ),
        (
            {"task": {"kind": "causal-lm", "separator": " ", "chat": True}, "data": {"prompt": "q", "response": "a"}},
            ["task.separator", "task.chat", "remove it"],
        ),
        (
            {"task": {"class_weights": [1.0, 2.0]}, "train": {"reduction": "example"}},
            ["task.class_weights", "train.reduction"],
        ),
        (
            {"train": {"warmup": 1.5}},
            ["train.warmup = 1.5", "a whole number of at least 0, or a number of at least 0 and below 1"],
        ),
        ({"train": {"beta2": 1.0}}, ["train.beta2 = 1.0", "below 1"]),
        ({"train": {"max_steps": 0}}, ["train.max_steps = 0", "of at least 1"]),
        ({"train": {"schedule": "cosin"}}, ["train.schedule = 'cosin'", "'cosine'"]),
        ({"train": {"momentum": 0.9}}, ["train.momentum", "train.optimizer = 'adamw'"]),
        ({"train": {"optimizer": "sgd", "beta1": 0.5}}, ["train.beta1", "train.optimizer = 'sgd'"]),
        ({"train": {"optimizer": "sgd", "nesterov": True}}, ["train.nesterov", "train.momentum"]),
        ({"train": {"min_lr_rate": 0.1}}, ["train.min_lr_rate", "train.round_schedule"]),
        ({"train": {"warmup_ratio": 0.1}}, ["'train.warmup_ratio'", "'train.warmup'"]),
        ({"train": {"batch": 3}}, ["'train.batch'", "'batches'"]),
        ({"train": 3}, ["train = 3"]),
        ({"trian": {}}, ["'trian'", "'train'"]),
        ({"data": 5}, ["data = 5"]),
        ({"data": {"test_fraction": 1.0}}, ["data.test_fraction = 1.0", "above 0 and below 1"]),
        ({"clients": {"partition": "natural"}, "data": "x.csv"}, ["clients.partition = 'natural'", "data.user"]),
        ({"clients": {"ranks": [8, 0]}}, ["clients.ranks.1 = 0", "a whole number of at least 1"]),
        ({"clients": {"ranks": "nrmal"}}, ["clients.ranks = 'nrmal'", "'normal'"]),
        ({"clients": {"ranks": [8, 8], "count": 3}}, ["clients.ranks", "2 entries", "3 clients"]),
        ({"lora": {"targets": 7}}, ["lora.targets = 7"]),
        ({"lora": {"rank_pattern": {"query": 0}}}, ["lora.rank_pattern.query = 0", "of at least 1"]),
        ({"method": "fedit"}, ["method = 'fedit'"]),
        ({"method": {"name": "fedavg"}}, ["method", "'fedavg'"]),
        ({"method": {"name": "fedit", "shared": "a"}}, ["method", "fedit has no setting 'shared'"]),
        ({"method": {"rank": "big"}}, ["method.rank = 'big'", "whole number"]),
        ({"method": {"rank": 2.5}}, ["method.rank = 2.5", "whole number"]),
        ({"method": {"rank": -1}}, ["method.rank = -1", "of at least 1"]),
        ({"method": {"name": "flasc", "by_examples": True}}, ["'by_examples'", "set weights = 'examples'"]),
        ({"method": {"weights": "equal"}}, ["method.weights = 'equal'", "'uniform'"]),
        ({"evaluate": {"clients": "some"}}, ["evaluate.clients = 'some'", "'chosen'"]),
    ],
)
def test_a_refusal_names_the_file_the_key_the_value_and_what_is_allowed(table, parts, tmp_path):
    path = saved(tmp_path, table)
    with pytest.raises(UserError) as rejected:
        Experiment.load(path)
    message = str(rejected.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize("name", NO_MIXED)
@pytest.mark.parametrize("ranks", [[2, 4], "uniform"])
def test_mixed_ranks_are_refused_for_methods_that_cannot(name, ranks):
    with pytest.raises(UserError, match=f"clients.ranks: {name} needs the same rank 4"):
        build({"method": {"name": name, "rank": 4}, "clients": {"count": 2, "ranks": ranks}})
    assert build({"method": {"name": name, "rank": 4}, "clients": {"count": 2, "ranks": [4, 4]}}).clients.ranks == [4, 4]


@pytest.mark.parametrize("name", TABLE)
def test_weight_decay_is_refused_exactly_for_methods_that_need_none(name):
    """Before anything is loaded, in one line with the reason."""
    table, reason = {"method": {"name": name}, "train": {"weight_decay": 0.01}}, TABLE[name].no_weight_decay
    if not reason:
        assert build(table).train.weight_decay == 0.01
        return
    with pytest.raises(UserError) as refused:
        build(table)
    assert str(refused.value) == f"experiment: train.weight_decay = 0.01: {name} needs 0: {reason}"
    assert build({"method": {"name": name}}).train.weight_decay == 0


@pytest.mark.parametrize("override", ["rounds", "=3", "train.=3"])
def test_an_override_that_is_none_is_refused(override):
    with pytest.raises(UserError, match=f"^--set '{override}': "):
        build({}, [override])


@pytest.mark.parametrize("name", TABLE)
def test_a_method_has_its_own_weights_unless_they_are_set(name):
    assert build({"method": {"name": name}}).method.uniform == (TABLE[name].weights == "uniform")
    for weights in ("examples", "uniform"):
        assert build({"method": {"name": name, "weights": weights}}).method.uniform == (weights == "uniform")
