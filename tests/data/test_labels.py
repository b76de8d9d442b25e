"""One rule for labels, owners and tasks: a table means the same in every format."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from pyarrow import parquet

from fedlora.config.sections import Data
from fedlora.data.labels import found_labels
from fedlora.data.sources import unlearned_labels
from fedlora.errors import UserError
from reading import load, load_own

ENDINGS = ("csv", "jsonl", "json", "columns.json", "parquet")


def write(path: Path, labels: list[Any], **others: list[Any]) -> str:
    """A table with these labels, in the format of the file's ending."""
    columns = {"text": [f"text {i}" for i in range(len(labels))], "label": labels, **others}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if path.suffix == ".parquet":
        parquet.write_table(pa.table(columns), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(columns))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        path.write_text(json.dumps(columns if ".columns" in path.name else rows), encoding="utf-8")
    return str(path)


def named(corpus: Any) -> list[str]:
    return [corpus.labels[index] for index in corpus.train["label"]]


def rejection_reason(**data: Any) -> str:
    with pytest.raises(UserError) as error:
        load(Data(**data), 0)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("labels", "names", "meant"),
    [
        ([1.0, 0.0, 2.0], ("0", "1", "2"), ["1", "0", "2"]),
        (["1.0", "0.0", "1"], ("0", "1"), ["1", "0", "1"]),
        ([1, -1, 1], ("-1", "1"), ["1", "-1", "1"]),
        ([25340, 10101, 10101], ("10101", "25340"), ["25340", "10101", "10101"]),
        ([10, 9, 100], ("9", "10", "100"), ["10", "9", "100"]),
        ([True, False, True], ("false", "true"), ["true", "false", "true"]),
        (["TRUE", "False", "true"], ("false", "true"), ["true", "false", "true"]),
        ([" yes", "no ", "yes"], ("no", "yes"), ["yes", "no", "yes"]),
        (["010", "009", "100"], ("009", "010", "100"), ["010", "009", "100"]),
        (["1.10", "1.1a", "1.10"], ("1.10", "1.1a"), ["1.10", "1.1a", "1.10"]),
        (["NA", "nan", "null"], ("NA", "nan", "null"), ["NA", "nan", "null"]),
        (["4" * 60, "5" * 60, "4" * 60], ("4" * 60, "5" * 60), ["4" * 60, "5" * 60, "4" * 60]),
    ],
)
def test_labels_are_the_same_names_in_every_format(tmp_path, ending, labels, names, meant):
    path = write(tmp_path / f"d.{ending}", labels)
    corpus = load(Data(source=path, test=path), 0)
    assert corpus.labels == names and named(corpus) == meant


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ([0.5, 1.0, 0.0], "row 1 has a label that is a fraction"),
        ([0, -1, 1], "row 2 has a label that is -1, which often marks an example without a label"),
        ([1.0, None, 0.0], "row 2 has no label"),
        ([math.nan, 1.0, 0.0], "row 1 has no label"),
        (["a", " ", "b"], "row 2 has no label"),
        (["01", "1", "x"], "is a number that other examples write differently"),
        (["same", "same", "same"], "all examples have the same label"),
    ],
)
def test_a_label_that_is_missing_or_not_clear_is_refused_with_its_row_in_every_format(tmp_path, ending, labels, reason):
    if ending == "csv":
        labels = ["" if label is None or label != label else label for label in labels]
    message = rejection_reason(source=write(tmp_path / f"d.{ending}", labels))
    assert reason in message and "column 'label' (data.label)" in message


@pytest.mark.parametrize("ending", ENDINGS)
def test_whole_numbers_are_indices_of_names_that_are_given(tmp_path, ending):
    path = write(tmp_path / f"d.{ending}", [1.0, 0.0, 1.0])
    (tmp_path / "labels.json").write_text('["weather", " house", "unseen"]')
    corpus = load(Data(source=path, test=path), 0)
    assert corpus.labels == ("weather", "house", "unseen") and named(corpus) == ["house", "weather", "house"]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("labels", [[3, 1, 2], ["3", "1", "2"], [3.0, 1.0, 2.0]])
def test_numbers_are_names_where_the_names_are_numbers(tmp_path, ending, labels):
    path = write(tmp_path / f"d.{ending}", labels)
    corpus = load(Data(source=path, test=path, labels=["1", "2", "3"]), 0)
    assert named(corpus) == ["3", "1", "2"]
    assert load_own(Data(), path, ["1", "2", "3"], 0)["label"][:] == [2, 0, 1]
    zero = write(tmp_path / f"z.{ending}", [0, 1, 2])
    assert "row 1 has a label that is not among the 3 names" in rejection_reason(source=zero, labels=["1", "2", "3"])


def test_names_that_are_given_make_minus_one_and_fractions_clear(tmp_path):
    path = write(tmp_path / "d.csv", ["0", "-1", "1"])
    assert named(load(Data(source=path, test=path, labels=["-1", "0", "1"]), 0)) == ["0", "-1", "1"]
    path = write(tmp_path / "d.csv", ["401.9", "250.00", "428"])
    assert load(Data(source=path, test=path, labels=["250.00", "401.9", "428.0"]), 0).train["label"][:] == [1, 0, 2]


def test_codes_with_leading_zeros_are_never_indices(tmp_path):
    path = write(tmp_path / "d.csv", ["01", "00"])
    found = rejection_reason(source=path, labels=["red", "green"])
    assert "row 1 has a label that is not among the 2 names" in found and "correct it, or complete data.labels" in found


@pytest.mark.parametrize("given", [None, ["left", "right", "up", "down"]])
def test_labels_of_the_test_set_that_no_client_learns_are_named(tmp_path, given):
    train = write(tmp_path / "train.jsonl", ["left", "right", "left"])
    test = write(tmp_path / "test.jsonl", ["up", "right", "up"])
    (note,) = unlearned_labels(load(Data(source=train, test=test, labels=given), 0))
    assert note == "labels of the test set without a training example, which no client learns: 'up'"
    assert unlearned_labels(load(Data(source=train, test=train, labels=given), 0)) == []


@pytest.mark.parametrize(
    ("train", "test", "labels"),
    [(["no", "yes"], ["maybe", "no"], ("maybe", "no", "yes")), ([2, 0], [1.0, 0.0], ("0", "1", "2"))],
)
def test_a_label_that_only_the_test_set_has_is_a_label_of_the_run(tmp_path, train, test, labels):
    source, evaluated = write(tmp_path / "train.jsonl", train), write(tmp_path / "test.jsonl", test)
    corpus = load(Data(source=source, test=evaluated), 0)
    assert corpus.labels == labels
    assert [corpus.labels[index] for index in corpus.test["label"]] == [str(label).removesuffix(".0") for label in test]


def test_a_label_that_only_labels_json_names_is_a_label_of_the_run(tmp_path):
    (tmp_path / "labels.json").write_text('["a", "b", "c"]')
    source, evaluated = write(tmp_path / "train.csv", [2, 0]), write(tmp_path / "test.csv", [1, 0])
    corpus = load(Data(source=source, test=evaluated), 0)
    assert corpus.labels == ("a", "b", "c") and corpus.test["label"][:] == [1, 0]


@pytest.mark.parametrize(("train", "test"), [([0, 1], ["0", "x"]), (["x", "y"], [0, 1]), ([1, 2], [-1, -1])])
def test_a_test_set_that_writes_labels_in_another_way_than_the_training_set_is_refused(tmp_path, train, test):
    message = rejection_reason(source=write(tmp_path / "train.jsonl", train), test=write(tmp_path / "test.jsonl", test))
    assert "data.test" in message and "row" in message


def test_the_labels_json_beside_a_clients_own_file_names_the_numbers_in_it(tmp_path):
    own = write(tmp_path / "own.csv", [0, 1, "weather"])
    assert load_own(Data(), own, ["weather", "house"], 0)["label"][:] == [0, 1, 0]
    (tmp_path / "labels.json").write_text('["house", "weather"]')
    assert load_own(Data(), own, ["weather", "house"], 0)["label"][:] == [1, 0, 0]


def test_a_class_label_of_the_hub_is_an_index_also_where_its_names_are_numbers(monkeypatch):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["1", "2", "3"])})
    split = Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 2]}, features=features)
    unlabelled = Dataset.from_dict({"text": ["a"], "label": [-1]}, features=features)
    shelf = DatasetDict({"train": split, "validation": split, "test": unlabelled})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: shelf)
    corpus = load(Data(source="stars", test="validation"), 0)
    assert corpus.labels == ("1", "2", "3") and corpus.train["label"][:] == [0, 1, 2]
    assert "split 'test', column 'label' (data.label): row 1 has no label" in rejection_reason(source="stars")


@pytest.mark.parametrize("names", [["a", "a "], ["1", "1.0"], ["a", " "], ["a", "\ud83d"]])
def test_given_names_that_are_empty_or_the_same_are_refused(tmp_path, names):
    path = write(tmp_path / "d.csv", ["a", "b"])
    assert rejection_reason(source=path, labels=names).startswith("data.labels: ")
    (tmp_path / "labels.json").write_text(json.dumps(names))
    assert "labels.json: " in rejection_reason(source=path)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("owners", "meant"),
    [([7.0, 8.0], ["7", "8"]), ([" a", "a "], ["a", "a"]), (["007", "7.0"], ["007", "7.0"]), ([3, 40], ["3", "40"])],
)
def test_owners_are_the_same_names_in_every_format(tmp_path, ending, owners, meant):
    path = write(tmp_path / f"d.{ending}", ["x", "y"], user=owners)
    assert load(Data(source=path, test=path, user="user"), 0).train["user"][:] == meant


@pytest.mark.parametrize("ending", ["jsonl", "json", "columns.json", "parquet"])
@pytest.mark.parametrize("owner", [math.nan, None])
@pytest.mark.parametrize("column", ["user", "task"])
def test_a_missing_owner_or_task_is_refused_with_its_row(tmp_path, ending, owner, column):
    path = write(tmp_path / f"d.{ending}", ["x", "y"], **{column: [7.0, owner]})
    assert f"column '{column}' (data.{column}): row 2 has no {column}" in rejection_reason(source=path, **{column: column})


def test_a_blank_owner_is_refused_with_its_row(tmp_path):
    path = write(tmp_path / "d.csv", ["x", "y"], user=["a", " "])
    assert "column 'user' (data.user): row 2 has no user" in rejection_reason(source=path, user="user")


@pytest.mark.parametrize("column", ["text", "label", "user"])
def test_half_of_a_surrogate_pair_is_refused_with_its_row_and_column(tmp_path, column):
    rows = [{"text": "a", "label": "x", "user": "u"}, {"text": "b", "label": "y", "user": "v", column: "cut \ud83d"}]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    message = rejection_reason(source=str(tmp_path / "d.json"), user="user")
    assert f"column '{column}' (data.{column}): row 2 has an unpaired surrogate" in message
    message.encode()


def test_a_column_of_texts_is_not_taken_for_the_labels(tmp_path):
    path = write(tmp_path / "d.jsonl", [f"a private text {i}" for i in range(300)])
    message = rejection_reason(source=path)
    assert "300 labels for 300 examples" in message and "private" not in message


def test_many_labels_that_come_back_are_labels():
    assert len(found_labels([f"{i}" for i in range(500)] * 2, [])) == 500


@pytest.mark.parametrize("value", ["a private text", 5, {"a private": "text"}, ["a private text"]])
@pytest.mark.parametrize("column", ["text", "label", "user"])
def test_no_message_about_a_value_quotes_it(tmp_path, value, column):
    rows = [{"text": "good", "label": label, "user": "u"} for label in ("red", "green")]
    bad = {**rows[0], column: value}
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text("\n".join(map(json.dumps, rows)))
    test.write_text("\n".join(map(json.dumps, [*rows, bad])))
    try:
        load(Data(source=str(train), test=str(test), user="user", labels=["red", "green"]), 0)
    except UserError as error:
        assert "row 3" in str(error) and "private" not in str(error)
    else:
        assert isinstance(value, str if column == "text" else str | int)
