"""The Python interface: what a program can pass, and what it gets."""

import io
import json
import math
import pydoc
import re
import subprocess
import sys
import types
import warnings
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from rich.console import Console

import fedlora
from fedlora import Experiment, Result, RunStopped, UserError, export, resume, run
from fedlora.config.experiment import build
from fedlora.config.sections import Data
from fedlora.data.memory import find
from fedlora.federated_data import FederatedData
from fedlora.report import terminal
from fedlora.rounds.progress import NullProgress

from wired import furnish, problem

TENSORS = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def rows(home):
    return [json.loads(line) for line in (home / "rows.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(home, tmp_path_factory):
    """A run of files, of two rounds, the first of them without an evaluation."""
    return run(experiment(home, evaluate={"every": 2}), tmp_path_factory.mktemp("finished") / "run")


def experiment(home, **more):
    return build({**problem(home), "rounds": 2, **more})


def one_line(call, *parts, error=UserError):
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    assert "\n" not in message and len(message) < 300
    for part in parts:
        assert part in message
    return message


# the package


def test_the_names_of_the_package_are_the_public_ones_and_each_is_documented():
    public = ["Comparison", "Experiment", "Result", "RunStopped", "UserError", "__version__"]
    public += ["compare", "evaluate", "export", "predict", "resume", "run", "sweep"]
    assert dir(fedlora) == sorted(fedlora.__all__) == public
    for name in public:
        assert name == "__version__" or getattr(fedlora, name).__doc__
    assert fedlora.run is run and callable(fedlora.export)  # neither is hidden by a module of its name


def test_help_begins_with_an_example_and_shows_each_public_name():
    text = pydoc.plain(pydoc.render_doc(fedlora))
    assert text.index("result = run(experiment") < text.index("PACKAGE CONTENTS")
    for name in ("class Experiment(", "class Result(", "class UserError(", "    run(", "    resume(", "    export("):
        assert name in text


def test_listing_the_names_imports_neither_torch_nor_pydantic():
    code = "import sys, fedlora; dir(fedlora); sys.exit(bool({'torch', 'pydantic', 'transformers'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# the experiment


@pytest.mark.parametrize(
    "table", [{"rounds": 0}, {"train": {"lr": -1}}, {"method": {"name": "fedt"}}, {"round": 1}, {"data": {"text": 3}}]
)
@pytest.mark.parametrize("make", [lambda table: Experiment(**table), Experiment.model_validate])
def test_an_invalid_setting_has_the_message_of_the_command_line(make, table):
    assert f"experiment: {one_line(lambda: make(table))}" == one_line(lambda: build(table))


@pytest.mark.parametrize(
    "table",
    [
        {"data": [{"text": "secret", "label": "a"}]},
        {"data": pd.DataFrame({"text": ["secret"], "label": ["a"]})},
        {"data": {"text": ["secret"], "label": ["a"]}},
        {"data": {"train": [{"text": "secret", "label": "a"}]}},
        {"model": torch.nn.Sequential(torch.nn.Linear(2, 3))},
    ],
)
def test_rows_or_a_model_among_the_settings_are_refused_in_one_line_without_quoting_them(table):
    assert "secret" not in one_line(lambda: Experiment(**table), *table)
    assert "secret" not in one_line(lambda: Experiment.model_validate([table]), "of type list")


def test_an_experiment_is_loaded_with_overrides_and_the_files_name_in_messages(tmp_path):
    (tmp_path / "e.toml").write_text("rounds = 3\n[method]\nname = 'rolora'\n")
    loaded = Experiment.load(str(tmp_path / "e.toml"), ["method.rank=4", "seed=2"])
    assert loaded == Experiment(rounds=3, seed=2, method={"name": "rolora", "rank": 4})
    one_line(lambda: Experiment.load(tmp_path / "e.toml", ["rounds=0"]), str(tmp_path / "e.toml"), "rounds = 0")
    one_line(lambda: Experiment.load(tmp_path / "f.toml"), str(tmp_path / "f.toml"), "no such file")


# rows in memory


@pytest.mark.parametrize(
    "kind",
    [
        list,
        tuple,
        lambda rows: [{name: np.str_(value) for name, value in row.items()} for row in rows],
        datasets.Dataset.from_list,
        lambda rows: datasets.Dataset.from_list(rows).with_format("numpy"),
        pd.DataFrame,
        lambda rows: pd.DataFrame(rows, index=range(5, 5 + len(rows))).astype({"label": "category"}),
    ],
)
def test_rows_in_memory_are_the_examples_that_a_file_of_them_gives(kind, home, rows):
    data = {"source": str(home / "rows.jsonl"), "user": "user"}
    settings = experiment(home, data=data, clients={"partition": "natural"})
    assert FederatedData.make(settings, kind(rows)).fingerprint == FederatedData.make(settings).fingerprint


@pytest.mark.parametrize("second", ["test", "validation"])
@pytest.mark.parametrize("kind", [lambda splits: splits, lambda splits: datasets.DatasetDict(splits)])
def test_splits_in_memory_are_training_and_test_set(kind, second, home, rows, tmp_path):
    for name, part in (("train", rows[:60]), ("test", rows[60:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    files = experiment(home, data={"source": f"{tmp_path}/train.jsonl", "test": f"{tmp_path}/test.jsonl"})
    splits = {"train": datasets.Dataset.from_list(rows[:60]), second: datasets.Dataset.from_list(rows[60:])}
    assert FederatedData.make(experiment(home), kind(splits)).fingerprint == FederatedData.make(files).fingerprint


def test_labels_in_memory_follow_the_rules_for_files():
    def labels(data, **settings):
        home = experiment_without_model(**settings)
        return FederatedData.make(home, data).labelled_data

    texts = [f"text {i}" for i in range(12)]
    numbers = [i % 2 for i in range(12)]
    for given in (numbers, np.array(numbers), [float(i) for i in numbers], [str(i) for i in numbers]):
        assert labels([{"text": t, "label": x} for t, x in zip(texts, given, strict=True)]).labels == ("0", "1")
    frame = pd.DataFrame({"text": texts, "label": pd.array(numbers, dtype="Int64")})
    assert labels(frame).labels == ("0", "1")
    assert labels(frame, labels=["no", "yes"]).labels == ("no", "yes")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["b", "a"])})
    dataset = datasets.Dataset.from_dict({"text": texts, "label": numbers}, features=features)
    for given in (dataset, dataset.with_format("torch")):  # a format is for other users of the data set
        assert labels(given).labels == ("b", "a") and labels(given).train[:]["label"].count(0) > 0


def experiment_without_model(**data):
    return Experiment(data={"source": "memory", **data}, clients={"count": 2, "partition": "iid"})


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ([], ["data (list)", "no examples"]),
        ([("secret", "a")], ["data (list)", "row 1 is of type tuple", "list of mappings"]),
        ("rows.jsonl", ["data (str)", "list of mappings"]),
        ([{"text": "secret", "label": "a"}, {"text": None, "label": "b"}], ["data (list)", "'text'", "row 2 is empty"]),
        ([{"text": "secret", "label": None}], ["data (list)", "row 1 has no label"]),
        ([{"sentence": "secret", "label": 1}], ["no column 'text' (data.text)", "available: 'sentence'"]),
        (pd.DataFrame({"text": ["secret", "b"], "label": ["a", pd.NA]}), ["data (DataFrame)", "row 2 has no label"]),
        (pd.DataFrame({"text": ["secret", "b"], "label": pd.array([1, None], "Int64")}), ["row 2 has no label"]),
        (pd.DataFrame({"text": ["secret", "b"], "label": [1.0, np.nan]}), ["data (DataFrame)", "row 2 has no label"]),
        (pd.DataFrame([["secret", 1, 2]], columns=["text", "label", "label"]), ["'label'", "several columns"]),
        ({"test": [{"text": "secret", "label": 1}]}, ["no split 'train'", "available: 'test'"]),
        ({"train": [], "test": []}, ["data['train'] (list)", "no examples"]),
    ],
)
def test_rows_in_memory_that_cannot_be_used_are_refused_without_quoting_them(data, parts, tmp_path):
    message = one_line(lambda: run(experiment_without_model(), tmp_path / "run", data=data), *parts)
    assert "secret" not in message and not (tmp_path / "run").exists()


def test_a_test_file_may_go_with_rows_in_memory_and_a_test_split_may_not(home, rows):
    train, test = find(rows, str(home / "rows.jsonl"), "label")
    assert list(train.column("text")) == list(test.column("text"))
    one_line(lambda: find(rows, "test", "label"), "data.test = 'test'", "no splits")
    one_line(lambda: find({"train": rows}, "dev", "label"), "data.test", "no split 'dev'")


def test_a_run_of_rows_in_memory_equals_one_of_a_file_and_resumes_with_the_same_rows_only(home, rows, finished, tmp_path):
    settings = experiment(home, data={"source": "elsewhere.jsonl"}, rounds=1, evaluate={"every": 2})
    folder = run(settings, tmp_path / "run", data=rows).folder
    one_line(lambda: resume(folder, overrides=["rounds=2"]), "'memory'", "data=rows")
    for others in (rows[1:], [*rows[1:], rows[0]]):
        one_line(lambda others=others: resume(folder, data=others), "the data differ from those of the run")
    result = resume(folder, data=pd.DataFrame(rows))
    assert [row.round for row in result.rows] == [0, 1, 2]
    assert (folder / TENSORS).read_bytes() == (finished.folder / TENSORS).read_bytes()
    assert "elsewhere" not in (folder / "experiment.toml").read_text()


def test_a_natural_partition_of_rows_in_memory_needs_the_column_of_the_owners(rows):
    natural = Experiment(clients={"partition": "natural"})  # allowed for the default source, which has one
    one_line(lambda: run(natural, data=rows), "data.user")


def test_a_file_named_as_the_source_in_memory_does_not_stand_for_the_rows(rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "memory").touch()
    assert len(FederatedData.make(experiment_without_model(), rows).labelled_data.labels) == 3
    one_line(lambda: FederatedData.make(Experiment(data=Data(source="memory"))), "pass them with fedlora.run")


# a model in memory


def test_a_model_in_memory_gives_the_run_of_its_folder_and_is_not_changed(home, finished, tmp_path):
    model = transformers.AutoModel.from_pretrained(home / "bert").train()
    tokenizer = transformers.AutoTokenizer.from_pretrained(home / "bert")
    before, said = {name: x.clone() for name, x in model.state_dict().items()}, repr(tokenizer)
    settings = experiment(home, model="no/such-model", evaluate={"every": 2})
    result = run(settings, tmp_path / "run", model=model, tokenizer=tokenizer)
    assert (result.folder / TENSORS).read_bytes() == (finished.folder / TENSORS).read_bytes()
    assert model.training and repr(tokenizer) == said
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    merged = export(result.folder, "merged", tmp_path / "merged")[""]
    assert (merged / "model.safetensors").is_file()


def test_a_model_in_memory_comes_with_its_tokenizer_and_leaves_nothing_where_the_run_does_not_begin(home, tmp_path):
    model = transformers.AutoModel.from_pretrained(home / "bert")
    tokenizer = transformers.AutoTokenizer.from_pretrained(home / "bert")
    out = tmp_path / "run"
    one_line(lambda: run(experiment(home), out, model=model), "tokenizer is of type NoneType", "PreTrainedTokenizerBase")
    one_line(lambda: run(experiment(home), out, model="bert", tokenizer=tokenizer), "model is of type str")
    one_line(lambda: run(experiment(home), out, model=torch.nn.Linear(2, 3), tokenizer=tokenizer), "PreTrainedModel")
    one_line(lambda: run(experiment(home), out, data=[], model=model, tokenizer=tokenizer), "no examples")
    assert not out.exists()


# progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("progress", [True, False])
def test_a_run_shows_its_rounds_in_a_terminal_unless_that_is_turned_off(progress, home, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    folder = run(experiment(home, rounds=1), tmp_path / "run", progress=progress).folder
    resume(folder, overrides=["rounds=2"], progress=progress)
    printed = sys.stdout.getvalue()
    assert [f"round {n}/{n}  loss" in printed for n in (1, 2)] == [progress] * 2 and bool(printed) == progress


def test_the_rounds_of_a_run_whose_learning_rates_depend_on_them_cannot_be_increased(home, tmp_path):
    train = {**problem(home)["train"], "round_schedule": "cosine"}
    folder = run(experiment(home, rounds=1, train=train), tmp_path / "run").folder
    one_line(lambda: resume(folder, overrides=["rounds=2"]), "rounds = 2", "train.round_schedule = 'cosine'")


def test_nothing_is_shown_in_a_file_and_a_given_watcher_takes_the_place_of_the_terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # does not make a file a terminal
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with terminal.shown(2, True) as watch:
        assert isinstance(watch, NullProgress)
    mine = NullProgress()
    monkeypatch.setattr(sys, "stdout", Terminal())
    with terminal.shown(2, mine) as watch:
        assert watch is mine
    assert sys.stdout.getvalue() == ""


def test_a_notebook_without_widgets_shows_a_line_for_each_round_and_no_warning(home, tmp_path, monkeypatch):
    shown = []
    notebook = types.ModuleType("IPython.display")
    notebook.display = shown.append
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", notebook)
    monkeypatch.setattr(terminal, "find_spec", lambda name: None)
    monkeypatch.setattr(terminal, "Console", lambda: Console(force_jupyter=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(experiment(home, rounds=1), tmp_path / "run")
    assert [each.text.split("  ")[0] for each in shown if each.text.strip()] == ["round 0/1", "round 1/1"]


# the result


def test_without_an_evaluation_before_training_the_first_row_is_that_of_round_1(home, tmp_path):
    result = run(experiment(home, rounds=1, evaluate={"before": False}), tmp_path / "run")
    assert [row.round for row in result.rows] == [1]


def test_the_columns_of_a_data_frame_do_not_depend_on_the_evaluated_rounds(finished):
    columns = list(finished.to_pandas())
    assert list(replace(finished, rows=finished.rows[1:]).to_pandas()) == columns
    assert columns[0] == "round" and columns.index("global.accuracy") < columns.index("seconds.train")


def test_a_data_frame_of_the_clients_has_a_row_for_each_client_of_each_round(finished):
    frame = finished.clients()
    for row in finished.rows[1:]:
        own = frame[frame["round"] == row.round].set_index("client")
        assert own["loss"].to_dict() == {client: one.loss for client, one in row.per_client.items()}
        assert own["bytes_up"].sum() == row.bytes_up


def test_a_result_as_a_data_frame_has_a_row_for_each_round_and_a_column_for_each_number(finished):
    frame = finished.to_pandas()
    assert list(frame["round"]) == [0, 1, 2]
    for row, seen in zip(finished.rows, frame.to_dict("records"), strict=True):
        assert seen["train_loss"] == row.train_loss or (row.round == 0 and math.isnan(seen["train_loss"]))
        assert seen["seconds.train"] == row.seconds.train
        assert seen["accepted"] == row.accepted and seen["rejected"] == row.rejected
    last = finished.rows[-1]
    assert frame["global.accuracy"].isna().tolist() == [False, True, False]
    assert frame["global.accuracy"][2] == last.global_["accuracy"]
    assert frame["clients.accuracy.each"][2] == last.clients["accuracy"].each


def test_a_plot_shows_the_loss_and_the_accuracies_of_the_rounds_that_have_them(finished, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    axes = finished.plot()
    (loss,) = axes.lines
    assert loss.get_xydata().tolist() == [[row.round, row.train_loss] for row in finished.rows if row.round]
    (scores,) = (other for other in axes.figure.axes if other is not axes)
    first, _, last = finished.rows
    accuracies = {line.get_label(): line.get_xydata().tolist() for line in scores.lines}
    assert accuracies == {
        "test accuracy": [[0, first.global_["accuracy"]], [2, last.global_["accuracy"]]],
        "held-out accuracy": [[0, first.clients["accuracy"].mean], [2, last.clients["accuracy"].mean]],
    }
    pyplot.close(axes.figure)


@pytest.mark.parametrize(("call", "package"), [(Result.to_pandas, "pandas"), (Result.plot, "matplotlib")])
def test_a_package_that_is_not_installed_is_named(call, package, finished, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    one_line(lambda: call(finished), f"pip install {package}")


def test_a_result_is_shown_in_one_line_with_its_last_accuracies(finished):
    last = finished.rows[-1]
    accuracies = f"test accuracy {last.global_['accuracy']:.3f}, held-out accuracy {last.clients['accuracy'].mean:.3f}"
    assert repr(finished) == f"Result(fedit, 2 rounds, {accuracies}, {str(finished.folder)!r})"
    assert repr(Result(finished.folder, "fedit", finished.rows[1:2], {})).startswith("Result(fedit, 1 round, '")


@pytest.mark.slow
def test_every_example_of_the_page_runs_and_prints_what_its_comments_say(home, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
    pytest.importorskip("matplotlib").use("agg")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "bert").symlink_to(home / "bert")
    (tmp_path / "tickets.jsonl").symlink_to(home / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    names = {}
    for example in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        exec(example, names)
    promised, printed = re.findall(r"print\(\w+\)  # (.*?)(?:\.\.\.)?$", page, re.MULTILINE), capsys.readouterr().out
    assert len(promised) == 2 and all(text in printed for text in promised)
    runs = {folder.name: len((folder / "rounds.jsonl").read_text().splitlines()) for folder in Path("runs").iterdir()}
    assert runs == {"first": 3, "frame": 3, "splits": 2, "model": 2, "watched": 2, "second": 3}
    assert names["model"].num_labels == 3 and Path("first.png").stat().st_size


def test_both_errors_can_be_caught_by_their_public_names(tmp_path):
    from fedlora import errors

    assert (UserError, RunStopped) == (errors.UserError, errors.RunStopped)
    one_line(lambda: resume(tmp_path), "not a run directory")
