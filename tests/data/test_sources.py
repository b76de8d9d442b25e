import csv
import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from pyarrow import parquet

from fedlora.config.sections import Data
from fedlora.errors import UserError
from reading import load

ROWS = [{"text": f"007 née {i}, so\nto say", "label": i % 3, "user": f"u{i % 2}"} for i in range(12)]


def write(path, rows):
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
        return path
    with gzip.open(path, "wt", encoding="utf-8") if path.suffix == ".gz" else path.open("w", encoding="utf-8") as file:
        if ".csv" in path.name:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.write("\n".join(json.dumps(row) for row in rows))
    return path


def rejection_reason(seed=0, **data):
    with pytest.raises(UserError) as error:
        load(Data(**data), seed)
    assert "\n" not in str(error.value)
    return str(error.value)


def in_order(corpus):
    return sorted([*corpus.train.to_list(), *corpus.test.to_list()], key=lambda row: ROWS.index(row))


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the hub: what it is filled with is what it has."""
    shelf = {}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset: shelf[name, subset])
    return shelf


@pytest.mark.parametrize("ending", ["jsonl", "json", "jsonl.gz", "json.gz", "csv", "csv.gz", "parquet"])
def test_every_local_format_gives_back_what_was_written(tmp_path, ending):
    path = write(tmp_path / f"train.{ending}", ROWS)
    corpus = load(Data(source=str(path), user="user"), seed=0)
    assert in_order(corpus) == ROWS
    assert corpus.labels == ("0", "1", "2")


def test_one_json_list_is_as_good_as_json_lines(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps(ROWS, indent=1))
    assert in_order(load(Data(source=str(path), user="user"), seed=0)) == ROWS


def test_text_in_csv_stays_text(tmp_path):
    texts = ["1", "2020-01-01", "NA", "null"]
    path = write(tmp_path / "train.csv", [{"text": text, "label": i % 2} for i, text in enumerate(texts)])
    corpus = load(Data(source=str(path), test=str(path)), seed=0)
    assert corpus.train["text"][:] == texts


def test_columns_get_our_names_and_others_go(tmp_path):
    rows = [{"q": "a", "a": "b", "y": i, "who": i, "extra": {"x": 1}} for i in (0, 1)]
    path = str(write(tmp_path / "train.jsonl", rows))
    corpus = load(Data(source=path, test=path, text="q", text_pair="a", label="y", user="who"), seed=0)
    assert corpus.train.to_list() == [{"text": "a", "text_pair": "b", "label": i, "user": str(i)} for i in (0, 1)]


def test_labels_json_beside_the_file_names_the_labels(tmp_path):
    (tmp_path / "labels.json").write_text('["red", "green", "blue", "unseen"]')
    path = write(tmp_path / "train.csv", ROWS)
    assert load(Data(source=str(path)), seed=0).labels == ("red", "green", "blue", "unseen")


def test_labels_that_are_words_are_numbered_in_alphabetical_order(tmp_path):
    path = str(write(tmp_path / "train.jsonl", [{"text": "x", "label": label} for label in ("no", "yes", "maybe", "no")]))
    corpus = load(Data(source=path, test=path), seed=0)
    assert corpus.labels == ("maybe", "no", "yes")
    assert corpus.train["label"][:] == [1, 2, 0, 1]


def test_the_test_part_is_random_seeded_and_apart_from_the_training_part(tmp_path):
    path = str(write(tmp_path / "train.jsonl", ROWS))
    first, again, other = (load(Data(source=path, test_fraction=0.25), seed) for seed in (1, 1, 2))
    assert (len(first.train), len(first.test)) == (9, 3)
    assert set(first.train["text"]) | set(first.test["text"]) == {row["text"] for row in ROWS}
    assert first.test["text"][:] == again.test["text"][:] != other.test["text"][:]


def test_rows_are_drawn_at_random_and_the_smaller_draw_is_part_of_the_larger(tmp_path):
    path = str(write(tmp_path / "train.jsonl", ROWS))
    small, large = (load(Data(source=path, test=path, rows=n, test_rows=4), seed=0) for n in (3, 6))
    assert (len(small.train), len(large.train), len(small.test)) == (3, 6, 4)
    assert set(small.train["text"]) < set(large.train["text"])
    assert set(small.train["text"]) != {row["text"] for row in ROWS[:3]}


@pytest.mark.slow
def test_the_standard_library_needs_no_settings():
    corpus = load(Data(test_rows=50), seed=0)
    assert corpus.train.column_names == ["text", "label", "user"]
    assert len(corpus.test) == 50
    assert len(corpus.labels) >= 10


@pytest.mark.parametrize(
    ("splits", "expected"), [(["train", "validation", "test"], "test"), (["train", "validation"], "validation")]
)
def test_a_hub_data_set_is_evaluated_on_its_test_split_or_else_its_validation_split(hub, splits, expected):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    hub["owner/films", "small"] = DatasetDict(
        {split: Dataset.from_dict({"text": [split] * 2, "label": [0, 1]}, features=features) for split in splits}
    )
    corpus = load(Data(source="owner/films:small"), seed=0)
    assert set(corpus.test["text"]) == {expected}
    assert corpus.labels == ("bad", "good")


def test_a_split_that_the_hub_data_set_lacks_is_refused_with_those_there_are(hub):
    hub["films", None] = DatasetDict({"train": Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})})
    assert "no split 'tests'; available: 'train'" in rejection_reason(source="films", test="tests")


def test_an_unreachable_hub_is_one_line_with_the_way_out(monkeypatch):
    def unreachable(*_):
        raise ConnectionError("cannot reach the hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = rejection_reason(source="films")
    assert all(word in message for word in ("'films'", "cannot reach the hub", "path", "HF_HUB_OFFLINE"))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], ["no examples"]),
        ([{"text": "a", "lable": 0}], ["no column 'label'", "did you mean 'lable'", "'text', 'lable'"]),
        ([{"text": "a", "label": 0}, {"text": " ", "label": 1}], ["row 2", "empty", "data.text"]),
        ([{"text": "a", "label": 0}, {"label": 1}], ["row 2", "empty"]),
        ([{"text": 5, "label": 0}], ["row 1 is of type int, not text"]),
        ([{"text": "a", "label": None}], ["row 1 has no label"]),
        ([{"text": "a", "label": 7}, {"text": "b", "label": 7}], ["all examples have the same label", "two labels"]),
    ],
)
def test_examples_that_cannot_be_used_are_refused_with_file_row_and_column(tmp_path, rows, words):
    path = write(tmp_path / "train.jsonl", rows)
    message = rejection_reason(source=str(path))
    assert all(word in message for word in ["data.source", "train.jsonl", *words])


def test_a_missing_owner_column_is_refused(tmp_path):
    path = write(tmp_path / "train.jsonl", ROWS)
    assert "no column 'usr' (data.user); did you mean 'user'?" in rejection_reason(source=str(path), user="usr")


def test_an_example_without_owner_is_refused(tmp_path):
    path = write(tmp_path / "train.jsonl", [*ROWS, {"text": "a", "label": 0}])
    assert "row 13 has no user" in rejection_reason(source=str(path), user="user")


def test_tasks_are_read_where_they_are_asked_for_and_a_test_set_needs_none(tmp_path):
    train = write(tmp_path / "train.jsonl", [{**row, "kind": f"t{i % 2}"} for i, row in enumerate(ROWS)])
    corpus = load(Data(source=str(train), test=str(write(tmp_path / "test.jsonl", ROWS)), task="kind"), seed=0)
    assert corpus.train["task"][:] == ["t0", "t1"] * 6 and "task" not in corpus.test.column_names
    assert "no column 'kinds' (data.task); did you mean 'kind'?" in rejection_reason(source=str(train), task="kinds")
    write(tmp_path / "holes.jsonl", [{**row, "kind": "t0" if i else None} for i, row in enumerate(ROWS)])
    assert "row 1 has no task" in rejection_reason(source=str(tmp_path / "holes.jsonl"), task="kind")


@pytest.mark.parametrize("source", ["./train.jsonl", "missing.csv.gz", "/nowhere/x.parquet"])
def test_a_file_that_is_not_there_is_refused_and_not_sought_on_the_hub(source):
    assert "no such file" in rejection_reason(source=source)


def test_a_folder_and_an_unknown_ending_are_refused(tmp_path):
    (tmp_path / "train.xlsx").write_text("x")
    assert "is a folder" in rejection_reason(source=str(tmp_path))
    assert "expected .jsonl" in rejection_reason(source=str(tmp_path / "train.xlsx"))


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz", "train.csv.gz", "train.parquet", "train.json"])
def test_a_broken_file_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b'[{"text": \xff\x00')
    assert "not readable" in rejection_reason(source=str(tmp_path / name))


def test_a_broken_line_is_refused_with_its_number(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": 0}\n{"text": \n')
    assert "line 2 is not JSON" in rejection_reason(source=str(tmp_path / "train.jsonl"))


def test_a_split_name_for_a_local_file_is_refused(tmp_path):
    assert "has no splits" in rejection_reason(source=str(write(tmp_path / "train.jsonl", ROWS)), test="validation")


def test_label_names_that_do_not_fit_are_refused(tmp_path):
    path = write(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "labels.json").write_text('["red", "green"]')
    assert "row 3 has a label that is not among the 2 names" in rejection_reason(source=str(path))
    (tmp_path / "labels.json").write_text('{"red": 0}')
    assert "labels.json: expected a list" in rejection_reason(source=str(path))


def test_banking77_loads_with_its_published_sizes():
    folder = Path(__file__).resolve().parents[2].parent / "shared/data/banking77"
    if not folder.is_dir():
        pytest.skip("the BANKING77 files are not beside the checkout")
    corpus = load(Data(source=str(folder / "train.jsonl.gz"), test=str(folder / "test.jsonl.gz")), seed=0)
    assert (len(corpus.train), len(corpus.test), len(corpus.labels)) == (10003, 3080, 77)
    assert corpus.labels[0] == "card_arrival"
