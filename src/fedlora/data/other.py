"""Examples outside of a run's data: to evaluate a trained model, or without targets, to be predicted."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets

from fedlora.config.sections import Data
from fedlora.data.columns import Column
from fedlora.data.examples import Columns, examples, label_of, size
from fedlora.data.memory import EXPECTED_TABLE
from fedlora.data.memory import table as table_in_memory
from fedlora.data.sources import data_set, labelled
from fedlora.data.tables import Table, of_file
from fedlora.errors import UserError

PLACEHOLDER = "-"
"""An answer in place of an unknown one."""


def load_labelled(data: Data, rows: Any, labels: Sequence[str], columns: Sequence[Column]) -> datasets.Dataset:
    """The examples in a file, given by its name, or in memory, with these columns and the labels of a run.

    Raises:
        UserError: not readable, an invalid value, or a label that the run does not have.
    """
    label = label_of(columns)
    table = _table(rows, None if label is None else getattr(data, label))
    return data_set(labelled(table, data, labels, columns))


def load_unlabelled(data: Data, rows: Any, columns: Sequence[Column]) -> datasets.Dataset:
    """As `load_labelled`, of the columns that are no targets; those of targets have placeholders, as tasks encode them.

    A text in a list is a row with the only other column. A conversation that does not end with an answer gets one as a
    placeholder.

    Raises:
        UserError: not readable, an invalid value, or texts for a task that reads several columns.
    """
    read = [replace(one, kind="conversation") if one.kind == "messages" else one for one in columns if not one.target]
    if isinstance(rows, list) and rows and all(isinstance(one, str) for one in rows):
        rows = _of_texts(data, rows, read)
    found = examples(_table(rows, None), data.model_copy(update={"user": None, "task": None}), read)
    count = size(found)
    for column in columns:
        if column.kind == "messages":
            found[column.name] = [_answered(messages) for messages in found[column.name]]
        elif column.target:
            found[column.name] = _placeholders(column, found, count)
    return data_set(found)


def _table(rows: Any, label: str | None) -> Table:
    """The rows; `label` is the column for which a data set may have names of classes."""
    if isinstance(rows, str | Path):
        return of_file(str(rows), "data")
    return table_in_memory(rows, "data", label, EXPECTED_TABLE)


def _of_texts(data: Data, texts: Sequence[str], columns: Sequence[Column]) -> list[dict[str, Any]]:
    """A row for each text: the text itself, its words, a message by the user, or the name of an image file."""
    if len(columns) > 1:
        names = ", ".join(column.name for column in columns)
        raise UserError(f"expected a file or rows with the columns {names}, which the task reads, found single texts")
    (column,) = columns
    name = getattr(data, column.name)
    forms = {"texts": str.split, "conversation": lambda text: [{"role": "user", "content": text}]}
    form: Any = forms.get(column.kind, str)
    return [{name: form(text)} for text in texts]


def _answered(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    if messages and messages[-1]["role"] == "assistant":
        return messages
    return [*messages, {"role": "assistant", "content": PLACEHOLDER}]


def _placeholders(column: Column, found: Columns, count: int) -> list[Any]:
    """A valid value of the column for each example."""
    match column.kind:
        case "text":
            return [PLACEHOLDER] * count
        case "number":
            return [0.0] * count
        case "tags":
            assert column.of is not None
            return [[0] * len(words) for words in found[column.of]]
        case _:  # indices of labels and options
            return [0] * count
