"""The commands that train nothing."""

import re
import shlex

import pytest
import torch
from commands import assert_refused

from fedlora import Experiment
from fedlora.config import reference
from fedlora.methods.table import TABLE
from fedlora.tasks.classification import Classification


def not_called(*_: object) -> None:
    raise AssertionError("a check reads no weights")


def test_each_method_has_one_line_of_eighty_columns(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, printed, _ = command("methods")
    lines = [line.rstrip() for line in printed.splitlines()]
    assert code == 0 and max(map(len, lines)) <= 80
    assert [line.split(maxsplit=1) for line in lines[: len(TABLE)]] == [[row.name, row.summary] for row in TABLE.values()]
    assert lines[len(TABLE) :] == ["", "Details of a method: fedlora methods NAME"]


@pytest.mark.parametrize(
    ("filters", "wanted"),
    [
        (["--secure"], lambda row: row.secure_sums().startswith("yes")),
        (["--mixed-ranks"], lambda row: row.mixed_ranks),
        (["--personal"], lambda row: row.personal),
        (["--secure", "--personal"], lambda row: row.secure_sums().startswith("yes") and row.personal),
    ],
)
def test_methods_are_filtered_by_what_they_can_do(filters, wanted, command):
    code, printed, _ = command("methods", *filters)
    listed = {line.split()[0] for line in printed.splitlines()[:-2]}
    assert code == 0 and listed == {name for name, row in TABLE.items() if wanted(row)} and listed != TABLE.keys()


def test_filters_that_no_method_passes_say_so(command, monkeypatch):
    monkeypatch.setattr("fedlora.methods.table.TABLE", {"fedit": TABLE["fedit"]})
    assert command("methods", "--personal") == (0, "no method has all of these properties\n", "")


def test_a_method_and_a_filter_together_are_rejected(command):
    assert_refused(command("methods", "fedit", "--secure"), "methods fedit", "expected a NAME or filters")


def test_one_method_is_told_of_in_full(command):
    code, printed, _ = command("methods", "flasc")
    assert code == 0 and TABLE["flasc"].noise in printed and "density_up = " in printed


def test_a_method_that_does_not_exist_is_refused(command):
    assert_refused(command("methods", "fedid"), "unknown method 'fedid'", "'fedit'")


def test_settings_are_listed_and_nothing_is_cut_in_eighty_columns(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, printed, _ = command("settings")
    assert code == 0 and "\u2026" not in printed and max(map(len, printed.splitlines())) <= 80
    for entry in reference.settings():
        assert re.search(rf"^ {re.escape(entry.key)} ", printed, re.MULTILINE)


def test_one_setting_is_described_in_full(command):
    (entry,) = reference.find("clients.partition")
    code, printed, _ = command("settings", "clients.partition")
    assert code == 0
    for part in (entry.text, entry.values, entry.default):
        assert part in " ".join(printed.split())


def test_a_setting_that_does_not_exist_is_rejected(command):
    assert_refused(command("settings", "train.epoch"), "unknown setting 'train.epoch'", "'train.epochs'")


def test_init_writes_an_experiment_with_all_defaults_and_overwrites_nothing(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert command("init") == (0, "experiment.toml\n", "")
    assert Experiment.load(tmp_path / "experiment.toml") == Experiment()
    (tmp_path / "experiment.toml").write_text("mine")
    assert_refused(command("init"), "experiment.toml: already exists")
    assert (tmp_path / "experiment.toml").read_text() == "mine"


def test_init_into_a_folder_that_does_not_exist_is_rejected(command, tmp_path):
    assert_refused(command("init", tmp_path / "none" / "mine.toml"), "mine.toml: cannot be written")


def test_a_check_prints_each_client_and_loads_no_model(place, command, monkeypatch):
    monkeypatch.setattr(Classification, "load", not_called)
    code, printed, errors = command("check", place / "good.toml", "--set", "clients.count=12")
    assert (code, errors) == (0, "")
    assert re.findall(r"^ *(\d{3}) ", printed, re.MULTILINE) == [f"{i:03}" for i in range(12)]


def test_a_check_of_a_private_experiment_prints_what_leaves_a_client(place, command, monkeypatch):
    monkeypatch.setattr(Classification, "load", not_called)
    settings = ("privacy.unit=client", "privacy.noise_multiplier=1.0", "privacy.delta=1e-5", "evaluate.clients=none")
    changes = [part for setting in settings for part in ("--set", setting)]
    code, printed, errors = command("check", place / "good.toml", *changes)
    assert (code, errors) == (0, "")
    for line in (
        r"values of the upload \(a, b, head\) +covered: ",
        r"number of examples, weight +fixed: 1",
        "loss.* not sent",
    ):
        assert re.search(line, printed), line
    summary = command("privacy", place / "good.toml", *changes)[1].splitlines()[-1]
    assert summary.startswith("epsilon ") and summary in printed.splitlines()
    of_records = command("check", place / "good.toml", *changes, "--set", "privacy.unit=record")[1]
    found = next(line for line in of_records.splitlines() if line.startswith("planned epsilon: fedlora privacy"))
    assert shlex.split(found)[3:] == ["privacy", str(place / "good.toml"), *changes, "--set", "privacy.unit=record"]
    refused = command("check", place / "good.toml", *changes, "--set", "method.name=flasc")
    assert_refused(refused, "privacy.unit = 'client' is not supported by flasc", "positions")


@pytest.mark.parametrize("verb", ["check", "run", "privacy"])
def test_examples_on_other_machines_cannot_be_used_here(verb, place, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = (
        "data.source=none",
        "privacy.unit=record",
        "privacy.epsilon=8",
        "privacy.delta=1e-5",
        "evaluate.clients=none",
    )
    changes = [part for setting in settings for part in ("--set", setting)]
    assert_refused(command(verb, place / "good.toml", *changes), "data.source = 'none': the ", "examples")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("model={place}/no-such", ["no-such", "config.json"]),
        ("model={place}/no-tokenizer", ["no-tokenizer", "tokenizer.save_pretrained"]),
        ("model={place}/cut", ["model.safetensors", "damaged"]),
        ('lora.targets=["query", "no_such"]', ["lora.targets", "'no_such'"]),
        ("lora.targets=quer(y", ["lora.targets", "regular expression"]),
        ("lora.rank_pattern={{no_such = 2}}", ["lora.rank_pattern", "'no_such'"]),
        ("method.rank=33", ["method.rank = 33", "at most 32"]),
        ("train.device=nowhere", ["train.device = 'nowhere'"]),
        pytest.param(
            "train.device=cuda",
            ["train.device = 'cuda'"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU"),
        ),
        ("data.source={place}/long.jsonl", ["train.max_length = 128", "at most 64"]),
        ("data.source={place}/unknown.jsonl", ["no text has a word of the tokenizer's vocabulary"]),
    ],
)
@pytest.mark.parametrize("verb", ["check", "run"])
def test_a_check_refuses_what_a_run_would_refuse_in_the_same_words(
    verb, change, parts, place, command, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    if verb == "check":
        monkeypatch.setattr(Classification, "load", not_called)
    result = command(verb, place / "good.toml", "--set", change.format(place=place))
    assert_refused(result, *parts)
    assert not result[1].strip()
