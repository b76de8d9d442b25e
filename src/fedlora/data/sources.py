"""Loads the examples of a run, a training and a test set with their targets, from the configured source."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch

from fedlora.config.sections import Data
from fedlora.data import memory
from fedlora.data.examples import Columns, examples, row_of, where
from fedlora.data.labels import LabelError, given_labels
from fedlora.data.tables import STDLIB_DOCS, find
from fedlora.data.targets import Targets
from fedlora.errors import UserError
from fedlora.randomness import generator


@dataclass(frozen=True)
class LabelledData:
    """Training and test examples with the columns text, label, and, if configured, text_pair and user.

    The column label has the task's targets, such as indices into `labels`. `user` is text; the test set has it only if its
    source does.
    """

    train: datasets.Dataset
    test: datasets.Dataset
    labels: tuple[str, ...]


def load(data: Data, seed: int, task: Targets, in_memory: Any = None) -> LabelledData:
    """The examples that `data` describes; deterministic for a given seed.

    Rows in memory replace `data.source`. The labels are those in `data.labels`, else those named by the hub or a
    `labels.json`, else those that `task` finds. All of the training and test set is validated before `rows` and `test_rows`
    are drawn.

    Raises:
        UserError: missing or unreadable data, an example without text or label, or an ambiguous label; names the file, the
            key and the row.
    """
    if in_memory is None and data.source == memory.MEMORY:
        raise UserError(
            "data.source = 'memory': the rows come from a Python program; pass them with fedlora.run(..., data=rows) or "
            "fedlora.resume(..., data=rows)"
        )
    if data.source == STDLIB_DOCS:
        data = data.model_copy(update={"text": "text", "text_pair": None, "label": "label", "user": "user"})
    if data.source == "none":
        empty = datasets.Dataset.from_dict({"text": [], "label": []})
        return LabelledData(empty, empty, _given(data.labels) or ())
    if in_memory is None:
        table, test_table = find(data.source, data.test, data.label)
    else:
        table, test_table = memory.find(in_memory, data.test, data.label)
    train, place = examples(table, data), where(table, data)
    test, test_place = ({}, "") if test_table is None else (examples(test_table, data, False), where(test_table, data))
    names = _given(data.labels) or table.labels or _found(task, train["label"], place, test.get("label", []), test_place)
    train["label"] = _targets(task, train["label"], names, place)
    if test_table is None:
        train, test = _split(train, data.test_fraction, seed)
    else:
        test["label"] = _targets(task, test["label"], names, test_place)
    return LabelledData(
        train=datasets.Dataset.from_dict(_draw(train, data.rows, seed, "rows")),
        test=datasets.Dataset.from_dict(_draw(test, data.test_rows, seed, "test rows")),
        labels=names,
    )


def load_own(data: Data, file: str, labels: Sequence[str], seed: int, task: Targets) -> datasets.Dataset:
    """All examples of one client's own file, with the columns of `load` and the labels of the run.

    Raises:
        UserError: not readable, an example without text or label, or a label that the run does not have.
    """
    table, _ = find(file, None, data.label)
    columns = examples(table, data.model_copy(update={"user": None, "task": None}))
    columns["label"] = _targets(task, columns["label"], labels, where(table, data))
    return datasets.Dataset.from_dict(_draw(columns, data.rows, seed, "rows"))


def _given(labels: list[str] | None) -> tuple[str, ...] | None:
    try:
        return given_labels(labels) if labels else None
    except ValueError as error:
        raise UserError(f"data.labels: {error}") from None


def _found(task: Targets, train: list[str], train_place: str, test: list[str], test_place: str) -> tuple[str, ...]:
    try:
        return task.label_space(train, test)
    except LabelError as error:
        raise row_of(error, train, train_place) if error.label in train else row_of(error, test, test_place) from None
    except ValueError as error:
        raise UserError(f"{train_place}: {error}") from None


def _targets(task: Targets, labels: list[str], names: Sequence[str], place: str) -> list[Any]:
    try:
        return task.targets(labels, names)
    except LabelError as error:
        raise row_of(error, labels, place) from None


def _split(columns: Columns, fraction: float, seed: int) -> tuple[Columns, Columns]:
    rows = len(columns["label"])
    order = torch.randperm(rows, generator=generator(seed, "test split")).tolist()
    count = min(max(round(fraction * rows), 1), rows - 1)
    return _rows(columns, order[count:]), _rows(columns, order[:count])


def _draw(columns: Columns, count: int | None, seed: int, purpose: str) -> Columns:
    rows = len(columns["label"])
    if count is None or count >= rows:
        return columns
    return _rows(columns, torch.randperm(rows, generator=generator(seed, purpose)).tolist()[:count])


def _rows(columns: Columns, rows: list[int]) -> Columns:
    return {name: [values[row] for row in sorted(rows)] for name, values in columns.items()}
