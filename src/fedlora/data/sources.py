"""Loads the examples of a run, a training and a test set with their targets, from the configured source."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import datasets
import pyarrow as pa
import torch

from fedlora.config.sections import Data
from fedlora.data import memory
from fedlora.data.columns import Column
from fedlora.data.examples import Columns, examples, label_of, row_of, size, where
from fedlora.data.labels import LabelError, found_labels, given_labels, label_ids
from fedlora.data.lists import as_lists, flat
from fedlora.data.tables import STDLIB_DOCS, Table, find
from fedlora.errors import UserError
from fedlora.printable import listed, quoted
from fedlora.randomness import generator

_PART = 256  # rows


@dataclass(frozen=True)
class LabelledData:
    """Training and test examples with the task's columns, and, if configured, user and task.

    A column of labels has indices into `labels`, which is empty for a task without labels. `user` is text; the test set has
    it only if its source does.
    """

    train: datasets.Dataset
    test: datasets.Dataset
    labels: tuple[str, ...]


def column_values(rows: datasets.Dataset) -> dict[str, Sequence[Any]]:
    """The values of each column as a list; those of bytes, such as images, as a sequence that reads one after the other."""
    return {
        name: rows[name] if getattr(kind, "dtype", None) == "binary" else rows[name][:]
        for name, kind in rows.features.items()
    }


def unlearned_labels(data: LabelledData) -> list[str]:
    """A note if labels of the test set have no training example; none if there is no training set."""
    column = next((name for name in ("label", "tags") if name in data.train.column_names), None)
    if not data.labels or column is None or not len(data.train) or not len(data.test):
        return []
    train, test = ({*flat(part[column][:])} for part in (data.train, data.test))
    if not (names := [quoted(data.labels[i]) for i in sorted(test - train)]):
        return []
    return [f"labels of the test set without a training example, which no client learns: {listed(names, 5)}"]


def load(data: Data, seed: int, columns: Sequence[Column], in_memory: Any = None) -> LabelledData:
    """The examples that `data` describes, with the columns that a task reads; deterministic for a given seed.

    Rows in memory replace `data.source`. The labels are those in `data.labels`, else those named by the hub or a
    `labels.json`, else those that occur. All of the training and test set is validated before `rows` and `test_rows` are
    drawn.

    Raises:
        UserError: missing or unreadable data, an invalid value, or an ambiguous label; names the file, the key and the row.
    """
    label = label_of(columns)
    if label is None and data.labels:
        raise UserError("data.labels: the task has no labels; remove this setting")
    if in_memory is None and data.source == memory.MEMORY:
        raise UserError(
            "data.source = 'memory': the rows come from a Python program; pass them with fedlora.run(..., data=rows) or "
            "fedlora.resume(..., data=rows)"
        )
    if data.source == STDLIB_DOCS:
        data = data.model_copy(update={"text": "text", "text_pair": None, "label": "label", "user": "user"})
    if data.source == "none":
        if label is not None and not data.labels:
            raise UserError("data.source = 'none' needs data.labels, the names of the clients' labels")
        empty = data_set({column.name: [] for column in columns})
        return LabelledData(empty, empty, _given(data.labels) or ())
    if in_memory is None:
        table, test_table = find(data.source, data.test, _class_column(data, label))
    else:
        table, test_table = memory.find(in_memory, data.test, _class_column(data, label))
    train = examples(table, data, columns)
    test = {} if test_table is None else examples(test_table, data, columns, False)
    names: tuple[str, ...] = ()
    if label is not None:
        place = where(table, data, label)
        test_place = "" if test_table is None else where(test_table, data, label)
        found = _given(data.labels) or table.labels
        names = found or _found(train[label], place, test.get(label, []), test_place)
        train[label] = _indices(train[label], names, place)
        if test_table is not None:
            test[label] = _indices(test[label], names, test_place)
    if test_table is None:
        train, test = _split(train, data.test_fraction, seed)
    return LabelledData(
        train=data_set(_draw(train, data.rows, seed, "rows")),
        test=data_set(_draw(test, data.test_rows, seed, "test rows")),
        labels=names,
    )


def load_own(data: Data, file: str, labels: Sequence[str], seed: int, columns: Sequence[Column]) -> datasets.Dataset:
    """All examples of one client's own file, with the columns of `load` and the labels of the run.

    Raises:
        UserError: not readable, an invalid value, or a label that the run does not have.
    """
    table, _ = find(file, None, _class_column(data, label_of(columns)))
    return data_set(_draw(labelled(table, data, labels, columns), data.rows, seed, "rows"))


def labelled(table: Table, data: Data, labels: Sequence[str], columns: Sequence[Column]) -> Columns:
    """The examples of a table without owners, with indices into the labels of a run.

    Raises:
        UserError: an invalid value, or a label that the run does not have.
    """
    found, label = examples(table, data.model_copy(update={"user": None, "task": None}), columns), label_of(columns)
    if label is not None:
        found[label] = _indices(found[label], labels, where(table, data, label))
    return found


def _class_column(data: Data, label: str | None) -> str | None:
    """The column for which the hub may have class names."""
    return None if label is None else getattr(data, label)


def _given(labels: list[str] | None) -> tuple[str, ...] | None:
    try:
        return given_labels(labels) if labels else None
    except ValueError as error:
        raise UserError(f"data.labels: {error}") from None


def _found(train: list[Any], train_place: str, test: list[Any], test_place: str) -> tuple[str, ...]:
    labels = flat(train)
    try:
        return found_labels(labels, flat(test))
    except LabelError as error:
        raise row_of(error, train, train_place) if error.label in labels else row_of(error, test, test_place) from None
    except ValueError as error:
        raise UserError(f"{train_place}: {error}") from None


def _indices(column: list[Any], names: Sequence[str], place: str) -> list[Any]:
    labels = flat(column)
    try:
        ids = label_ids(labels, names)
    except LabelError as error:
        raise row_of(error, column, place) from None
    return as_lists([ids[label] for label in labels], column)


def _split(columns: Columns, fraction: float, seed: int) -> tuple[Columns, Columns]:
    rows = size(columns)
    order = torch.randperm(rows, generator=generator(seed, "test split")).tolist()
    count = min(max(round(fraction * rows), 1), rows - 1)
    return _rows(columns, order[count:]), _rows(columns, order[:count])


def _draw(columns: Columns, count: int | None, seed: int, purpose: str) -> Columns:
    rows = size(columns)
    if count is None or count >= rows:
        return columns
    return _rows(columns, torch.randperm(rows, generator=generator(seed, purpose)).tolist()[:count])


def data_set(columns: Columns) -> datasets.Dataset:
    """The columns as a data set in memory, of the same types as with `Dataset.from_dict`.

    That function computes a fingerprint, for which it holds the data several times more. Bytes are in parts, as an array of
    Arrow has at most 2 GB, and is copied while it grows.
    """
    arrays = {
        name: pa.chunked_array([pa.array(values[i : i + _PART]) for i in range(0, len(values), _PART)])
        if values and isinstance(values[0], bytes)
        else pa.array(values)
        for name, values in columns.items()
    }
    return datasets.Dataset(datasets.table.InMemoryTable(pa.table(arrays)), fingerprint=uuid4().hex)


def _rows(columns: Columns, rows: list[int]) -> Columns:
    return {name: [values[row] for row in sorted(rows)] for name, values in columns.items()}
