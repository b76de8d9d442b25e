"""The command line: what it prints, and how it refuses what it cannot use."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from transformers import BertConfig

from fedlora import Experiment, api, cli, run
from fedlora.config import reference
from fedlora.errors import UserError
from fedlora.methods.table import TABLE
from fedlora.tasks.classification import Classification
from fedlora.version import __version__

from tiny import WORDS, tiny_bert, tiny_model, tiny_rows

Command = Callable[..., tuple[int, str, str]]
CLIENTS = {"count": 3, "partition": "iid"}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model, data, an experiment for them, and things that cannot be used."""
    place = tmp_path_factory.mktemp("cli")
    tiny_bert(place / "model")
    (place / "pickled").mkdir()
    (place / "pickled" / "config.json").write_text((place / "model" / "config.json").read_text())
    tiny_model(place / "no-tokenizer", BertConfig.from_pretrained(place / "model"))
    (place / "cut").mkdir()
    (place / "cut" / "config.json").write_text((place / "model" / "config.json").read_text())
    (place / "cut" / "model.safetensors").write_bytes((place / "model" / "model.safetensors").read_bytes()[:-9])
    tiny_bert(place / "five")
    tiny_model(place / "five", BertConfig.from_pretrained(place / "model", num_labels=5), head=True)
    tiny_rows(place / "rows.jsonl", 45)
    (place / "foreign.jsonl").write_text('{"text": "bab", "label": 3}\n')
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    for name, text in (("long", " ".join(WORDS)), ("unknown", "qqq")):
        (place / f"{name}.jsonl").write_text("".join(json.dumps({**row, "text": text}) + "\n" for row in rows))
    (place / "empty.jsonl").write_text("")
    table = {"model": str(place / "model"), "data": str(place / "rows.jsonl"), "rounds": 2, "clients": CLIENTS}
    write(place / "good.toml", table)
    (place / "broken.toml").write_text("rounds = = 2\n")
    return place


def write(path: Path, table: dict[str, Any]) -> None:
    path.write_text(tomli_w.dumps(table))


@pytest.fixture
def command(monkeypatch, capsys) -> Iterator[Command]:
    """Runs `fedlora` in this process; its exit code, what it printed, and its errors."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedlora", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
            sys.exit(0)
        return (stopped.value.code or 0, *capsys.readouterr())

    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield call
    for number, handler in signals.items():
        signal.signal(number, handler)  # after an interrupt they stay ignored


def assert_refused(result: tuple[int, str, str], *parts: str) -> None:
    code, _, errors = result
    assert code == 2
    assert re.fullmatch(r"error: [^\n]+\n", errors)
    for part in parts:
        assert part in errors


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
    assert_refused(command("run", place / "good.toml", "--out", place / "rows.jsonl" / "x"), "cannot be made", "--out")


@pytest.mark.parametrize("name", ["model", "no-such", "rows.jsonl"])
def test_what_is_no_run_cannot_be_resumed(name, place, command):
    assert_refused(command("run", "--resume", place / name), str(place / name), "no run here")


def test_a_resume_takes_nothing_else_and_a_run_takes_a_file(place, command):
    assert_refused(command("run", place / "good.toml", "--resume", place), "--resume takes no file")
    assert_refused(command("run", "--resume", place, "--out", place / "new"), "--resume takes no file and no --out")
    assert_refused(command("run"), "needs an experiment file")


def test_a_refusal_reaches_the_shell(place):
    done = subprocess.run(
        [sys.executable, "-m", "fedlora.cli", "run", place / "no-such.toml"], capture_output=True, text=True, check=False
    )
    assert_refused((done.returncode, done.stdout, done.stderr), "no-such.toml", "no such file")


def test_each_method_has_one_line_of_eighty_columns(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, printed, _ = command("methods")
    lines = [line.rstrip() for line in printed.splitlines()]
    assert code == 0 and max(map(len, lines)) <= 80
    assert [line.split(maxsplit=1) for line in lines[: len(TABLE)]] == [[row.name, row.summary] for row in TABLE.values()]
    assert lines[len(TABLE) :] == ["", "All about one of them: fedlora methods NAME"]


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
    assert code == 0 and TABLE["flasc"].private in printed and "density_up = " in printed


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


def not_called(*_: object) -> None:
    raise AssertionError("a check reads no weights")


def test_a_check_prints_each_client_and_loads_no_model(place, command, monkeypatch):
    monkeypatch.setattr(Classification, "load", not_called)
    code, printed, errors = command("check", place / "good.toml", "--set", "clients.count=12")
    assert (code, errors) == (0, "")
    assert re.findall(r"^ *(\d{3}) ", printed, re.MULTILINE) == [f"{i:03}" for i in range(12)]


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
        ("data.source={place}/unknown.jsonl", ["the tokenizer knows no word"]),
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


def test_a_new_head_is_told_of_once_and_written_down(place, command, tmp_path):
    code, printed, _ = command("run", place / "good.toml", "--out", tmp_path / "run", "--set", f"model={place}/five")
    assert code == 0 and printed.count("has a head for another number of labels") == 1
    (note,) = json.loads((tmp_path / "run" / "environment.json").read_text())["notes"]
    assert "classifier.weight is [5, 32], 3 labels need [3, 32]" in note


@pytest.fixture(scope="module")
def by_python(place) -> Path:
    """The folder of a run that a program started with the same file."""
    return run(Experiment.model_validate(tomllib.loads((place / "good.toml").read_text())), place / "by python").folder


def test_a_run_prints_each_round_and_the_paths_and_equals_a_run_by_python(place, by_python, command, tmp_path):
    code, printed, errors = command("run", place / "good.toml", "--out", tmp_path / "run")
    assert (code, errors) == (0, "")
    assert re.findall(r"^ +(\d+) +3 ", printed, re.MULTILINE) == ["1", "2"]
    assert f"run directory  {tmp_path / 'run'}\n" in printed
    assert f"PEFT adapter   {tmp_path / 'run' / 'adapter'}\n" in printed
    one, other = (folder / "adapter" / "adapter_model.safetensors" for folder in (tmp_path / "run", by_python))
    assert one.read_bytes() == other.read_bytes()


def test_a_run_without_an_adapter_that_peft_can_hold_says_why(place, command, tmp_path):
    code, printed, errors = command("run", place / "good.toml", "--out", tmp_path / "run", "--set", "method.name=fedlease")
    assert (code, errors) == (0, "")
    assert "PEFT adapters  3 of 3 not written: each input has its own mixture of experts" in printed
    assert_refused(command("export", tmp_path / "run", tmp_path / "out"), "own mixture of experts")


def test_a_set_value_takes_the_place_of_the_files(place, command, tmp_path):
    command("run", place / "good.toml", "--out", tmp_path / "run", "--set", "method.rank=2", "--set", "rounds=1")
    written = tomllib.loads((tmp_path / "run" / "experiment.toml").read_text())
    assert (written["method"]["rank"], written["rounds"]) == (2, 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_compiled_code_took_for_a_bad_file_is_still_an_interrupt(number, by_python, command, monkeypatch):
    def resume(path, watch):
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            raise UserError("the run is damaged") from None

    monkeypatch.setattr(api, "resume", resume)
    code, _, errors = command("run", "--resume", by_python)
    assert (code, errors) == (130, f"interrupted; go on with: fedlora run --resume {by_python}\n")


def test_of_five_interrupts_the_first_counts_and_the_others_disturb_nothing(by_python, command, monkeypatch):
    request = []

    def resume(path, watch):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            request.append("went on")
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGINT):
                os.kill(os.getpid(), number)
            request.append("put in order")

    monkeypatch.setattr(api, "resume", resume)
    code, _, errors = command("run", "--resume", by_python)
    assert (code, errors) == (130, f"interrupted; go on with: fedlora run --resume {by_python}\n")
    assert request == ["put in order"]
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN, "until the process has ended"


def test_an_interrupt_of_any_command_is_one_line(by_python, command, monkeypatch, tmp_path):
    monkeypatch.setattr(api, "export", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    code, _, errors = command("export", by_python, tmp_path / "out")
    assert (code, errors.strip().splitlines()[-1]) == (130, "interrupted")
    assert "Traceback" not in errors


def test_without_arguments_the_commands_are_listed(command):
    _, printed, _ = command()
    assert all(word in printed for word in ("Federated fine-tuning", "--version", "init", "settings"))


def test_what_is_not_interrupted_leaves_the_signals_as_they_were(command):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert command("--version") == (0, f"{__version__}\n", "")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


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
