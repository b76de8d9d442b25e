"""Validated columns of a table, under this package's names."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fedlora.config.sections import Data
from fedlora.data.labels import LabelError, label_ids
from fedlora.data.names import encodable, name, number, unified
from fedlora.data.tables import Table, choices
from fedlora.errors import UserError
from fedlora.printable import quoted

Columns = dict[str, list[Any]]


def examples(table: Table, data: Data, owners_needed: bool = True) -> Columns:
    """The configured columns among text, text_pair, label, user and task, with all values validated.

    Labels remain names; numbers are replaced by the table's names for them.

    Raises:
        UserError: a column is missing, or a value is invalid; names the table, the column and the row, not the value.
    """
    if not table.names:
        raise UserError(f"{table.origin} has no examples")
    read = {"text": _text, "text_pair": _text, "label": _named("label"), "user": _named("user"), "task": _named("task")}
    wanted = {ours: column for ours in read if (column := getattr(data, ours)) is not None}
    for ours in () if owners_needed else ("user", "task"):
        if getattr(data, ours) not in table.names:
            wanted.pop(ours, None)
    for ours, column in wanted.items():
        if column not in table.names:
            raise UserError(f"{table.origin} has no column {quoted(column)} (data.{ours}){choices(column, table.names)}")
    columns = {ours: _read(table, column, ours, read[ours]) for ours, column in wanted.items()}
    if not columns["text"]:
        raise UserError(f"{table.origin} has no examples")
    for ours in columns.keys() & {"label", "user", "task"}:
        columns[ours] = unified(columns[ours])
    if table.labels is not None:
        columns["label"] = _by_table(columns["label"], table.labels, where(table, data))
    return columns


def where(table: Table, data: Data) -> str:
    """The location of a table's labels, for error messages."""
    return _place(table, data.label, "label")


def row_of(error: LabelError, labels: Sequence[str], place: str) -> UserError:
    """An error about a label, reported for the first row that has it."""
    return UserError(f"{place}: row {labels.index(error.label) + 1} has a label that {error}")


def _by_table(labels: list[str], names: Sequence[str], place: str) -> list[str]:
    """The labels, with numbers replaced by the table's names for them."""
    try:
        ids = label_ids([label for label in labels if number(label) is not None], names)
    except LabelError as error:
        raise row_of(error, labels, place) from None
    return [name(names[ids[label]]) if label in ids else label for label in labels]


def _read(table: Table, column: str, ours: str, read: Callable[[Any], str]) -> list[str]:
    place, values = _place(table, column, ours), table.column(column)
    if values is None:
        raise UserError(f"{place}: several columns have this name; rename or remove all but one")
    return list(_checked(values, read, place))


def _checked(values: Iterable[Any], read: Callable[[Any], str], place: str) -> Iterable[str]:
    for row, value in enumerate(values, 1):
        try:
            yield read(value)
        except ValueError as error:
            raise UserError(f"{place}: row {row} {error}; fix or remove the row, or choose another column") from None


def _place(table: Table, column: str, ours: str) -> str:
    return f"{table.origin}, column {quoted(column)} (data.{ours})"


def _text(value: Any) -> str:
    if isinstance(value, str) and value.strip():
        return encodable(value)
    if value is None or isinstance(value, str) or value != value:
        raise ValueError("is empty")
    raise ValueError(f"is of type {type(value).__name__}, not text")


def _named(what: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if found := name(value):
            return found
        raise ValueError(f"has no {what}")

    return read
