"""The commands for runs: what they write and what they reject."""

import json
import os
import re
import shutil
import tomllib

import pytest
from commands import assert_refused, write

from fedlora import Experiment
from fedlora.deploy import launch
from fedlora.runs.result import Result


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("train.learning_rte=1", ["'train.learning_rte'", "allowed: optimizer, lr"]),
        ("lora.r=4", ["'lora.r'", "did you mean 'method.rank'"]),
        ("method.alpha=4", ["'alpha'", "did you mean 'lora.alpha'"]),
        ("train.epoch=1", ["'train.epoch'", "did you mean 'epochs'"]),
        ("round=1", ["'round'", "did you mean 'rounds'"]),
        ("clients.partition=dirichle", ["clients.partition", "'dirichle'", "did you mean 'dirichlet'"]),
        ("train.optimizer=adam", ["train.optimizer", "'adam'", "did you mean 'adamw'"]),
        ("clients.ranks=unifrm", ["clients.ranks = 'unifrm'", "did you mean 'uniform'"]),
        ("method.name=fedt", ["'fedt'", "did you mean 'fedit'"]),
        ("method.head=averagd", ["method.head", "'averagd'", "did you mean 'averaged'"]),
        ("method.rnk=2", ["'rnk'", "did you mean 'rank'"]),
        ("method.rank=0", ["rank = 0", "at least 1"]),
        ("method.rank=many", ["rank = 'many'"]),
        ("rounds=0", ["rounds = 0"]),
        ("sampling.fraction=0", ["sampling.fraction = 0"]),
        ("clients.ranks=[1, 2, 8]", ["clients.ranks", "same rank"]),
        ("train.device=nowhere", ["train.device = 'nowhere'"]),
        ('lora.targets=["no_such"]', ["lora.targets", "no_such", "query"]),
        ("model={place}/pickled", ["pickled", "no .safetensors file", "save_pretrained"]),
        ("model={place}/no-such", ["no-such", "config.json"]),
        ("model=package:no_such_package/model", ["'no_such_package'", "pip install"]),
        ("model=package:no_such.inner/model", ["'no_such.inner'", "pip install"]),
        ("data.source={place}/no-such.jsonl", ["data.source", "no-such.jsonl", "no such file"]),
        ("data.source={place}/empty.jsonl", ["empty.jsonl", "no examples"]),
        ("data.test={place}/foreign.jsonl", ["data.test", "row 1", "number", "the training set has names"]),
        ("data.label=colour", ["'colour'", "data.label", "label"]),
        ("clients.count=1000", ["clients.count = 1000", "lower"]),
        ("clients.min_size=14", ["clients.min_size = 14", "lower"]),
        ("clients={{count = 2, partition = 'pathological', classes = 4}}", ["clients.classes = 4", "lower"]),
        ("data.source", ["--set 'data.source'", "KEY=VALUE"]),
        ("rounds.more=1", ["--set 'rounds.more=1'", "not a table"]),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line_and_a_second_try_may_use_the_folder(
    change, parts, place, command, tmp_path
):
    assert_refused(
        command("run", place / "good.toml", "--out", tmp_path / "out", "--set", change.format(place=place)), *parts
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "part"), [("no-such.toml", "no such file"), ("broken.toml", "TOML"), ("model", "not readable")]
)
@pytest.mark.parametrize("verb", ["run", "check"])
def test_an_experiment_that_cannot_be_read_is_named(verb, name, part, place, command):
    assert_refused(command(verb, place / name), str(place / name), part)


def test_a_bad_value_in_a_file_is_refused_with_the_files_name(command, tmp_path):
    write(tmp_path / "bad.toml", {"clients": {"alpha": -1.0}})
    assert_refused(command("run", tmp_path / "bad.toml"), str(tmp_path / "bad.toml"), "clients.alpha = -1.0")


def test_an_out_folder_in_use_is_refused_and_stays_as_it_was(place, command, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    assert_refused(command("run", place / "good.toml", "--out", tmp_path), "not empty", "--resume", "--out")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_out_folder_that_cannot_be_made_is_refused(place, command):
    assert_refused(command("run", place / "good.toml", "--out", place / "rows.jsonl" / "x"), "cannot be created", "--out")


@pytest.mark.parametrize("name", ["model", "no-such", "rows.jsonl"])
def test_what_is_no_run_cannot_be_resumed(name, place, command):
    assert_refused(command("run", "--resume", place / name), str(place / name), "not a run directory")


@pytest.mark.parametrize("verb", [["run"], ["serve"], ["deploy", "local"]])
def test_a_resume_takes_nothing_else_and_a_run_takes_a_file(verb, place, command, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda mask: 0)  # of this process, which goes on
    found_both = "--resume: expected no experiment file and no --out"
    assert_refused(command(*verb, place / "good.toml", "--resume", place), found_both)
    assert_refused(command(*verb, "--resume", place, "--out", place / "new"), found_both)
    assert_refused(command(*verb), "expected an experiment file or --resume RUN_DIR, found neither")
    assert_refused(command(*verb, "--resume", place), f"{place}: not a run directory")


def test_the_number_of_supernodes_is_the_default_of_the_number_of_clients(place, command, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda mask: 0)
    monkeypatch.setattr(launch, "local", lambda path, count, *_: Result(path, "fedit", [], {}))
    table = tomllib.loads((place / "good.toml").read_text())
    write(tmp_path / "uncounted.toml", {**table, "clients": {}})
    for name, file, clients in (("own", place / "good.toml", 3), ("default", tmp_path / "uncounted.toml", 5)):
        code, _, errors = command("deploy", "local", "--clients", "5", file, "--out", tmp_path / name)
        assert (code, errors) == (0, "")
        assert Experiment.load(tmp_path / name / "experiment.toml").clients.count == clients


def test_a_new_head_is_told_of_once_and_written_down(place, command, tmp_path):
    code, printed, _ = command("run", place / "good.toml", "--out", tmp_path / "run", "--set", f"model={place}/five")
    assert code == 0 and printed.count("has a head of another size") == 1
    (note,) = json.loads((tmp_path / "run" / "environment.json").read_text())["notes"]
    assert "classifier.weight is [5, 32], the data require [3, 32]" in note


def test_a_set_value_takes_the_place_of_the_files(place, command, tmp_path):
    command("run", place / "good.toml", "--out", tmp_path / "run", "--set", "method.rank=2", "--set", "rounds=1")
    written = tomllib.loads((tmp_path / "run" / "experiment.toml").read_text())
    assert (written["method"]["rank"], written["rounds"]) == (2, 1)


def test_a_resumed_run_is_given_more_rounds_by_the_command(by_python, command, tmp_path):
    shutil.copytree(by_python, tmp_path / "run")
    code, printed, errors = command("run", "--resume", tmp_path / "run", "--set", "rounds=3")
    assert (code, errors) == (0, "") and re.findall(r"^ +(\d+) +3 ", printed, re.MULTILINE) == ["1", "2", "3"]
    assert_refused(
        command("run", "--resume", tmp_path / "run", "--set", "rounds=2"), "--set: rounds = 2, in the run it is 3"
    )


def test_an_export_prints_where_it_wrote(by_python, command, tmp_path):
    code, printed, _ = command("export", by_python, tmp_path / "merged", "--to", "merged")
    assert (code, printed) == (0, f"{tmp_path / 'merged'}\n")
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert_refused(command("export", by_python, tmp_path / "merged"), "not empty")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--to", "serving"), ["classifier.weight", "are not LoRA factors", "export a merged model"]),
        (("--to", "gguf-merged"), ["models of type 'bert' are not exported to GGUF", "llama"]),
        (("--dtype", "bf16"), ["dtype = 'bf16'", "adapters are written in fp32"]),
    ],
)
def test_a_form_that_cannot_hold_the_adapter_is_rejected_in_one_line(options, parts, by_python, command, tmp_path):
    assert_refused(command("export", by_python, tmp_path / "out", *options), *parts)
    assert not (tmp_path / "out").exists()


def test_an_export_of_an_unknown_client_lists_the_available_ones(by_python, command, tmp_path):
    result = command("export", by_python, tmp_path / "out", "--client", "nobody")
    assert_refused(result, "'nobody'", "available: the global adapter (without --client)")
