"""Columns of numbers, the same from every format."""

import csv
import json
from decimal import Decimal

import pyarrow as pa
import pytest
from pyarrow import parquet

from fedlora.config.sections import Data
from fedlora.data.columns import reader
from fedlora.data.sources import load
from fedlora.errors import UserError
from fedlora.tasks.regression import Regression

SCORES = [0, 1.5, -2.25, 4e2, 3.75, 5, 0.125, 2]


def read(source):
    """The data in a file, all of it as training and as test set."""
    data = Data(source=str(source), test=str(source))
    return load(data, 0, Regression().columns({"text", "label"}))


def write(path, scores):
    """A table with these scores, in the format of the file's ending; the file."""
    rows = [{"text": f"text {i}", "label": score} for i, score in enumerate(scores)]
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_scores_are_the_same_numbers_in_every_format(tmp_path, ending):
    scores = [*map(float, SCORES)] if ending == "parquet" else SCORES
    found = read(write(tmp_path / f"rows.{ending}", scores))
    assert found.train["label"][:] == found.test["label"][:] == [*map(float, SCORES)] and found.labels == ()


@pytest.mark.parametrize("value", [True, [1], {"a": 1}, "four", "", " ", "nan", None, float("nan"), 1e39, -(10**400)])
def test_what_is_no_finite_number_is_rejected_with_its_place_and_without_its_value(tmp_path, value):
    with pytest.raises(UserError) as error:
        read(write(tmp_path / "rows.jsonl", [1, value, 2]))
    message = str(error.value)
    assert "column 'label' (data.label): row 2 " in message and "fix or remove the row" in message
    assert "four" not in message and "1e+39" not in message


def test_decimals_and_text_in_any_notation_are_numbers():
    found = map(reader("number"), [Decimal("2.5"), "2.5", " +2.50", "25e-1", 2.5])
    assert set(found) == {2.5}


def test_names_of_labels_in_the_folder_do_not_change_numbers(tmp_path):
    (tmp_path / "labels.json").write_text('["a", "b"]')
    assert read(write(tmp_path / "rows.jsonl", [0, 1, 0, 1])).train["label"][:] == [0.0, 1.0, 0.0, 1.0]
