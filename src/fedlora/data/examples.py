"""Validated columns of a table, under this package's names."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from fedlora.config.sections import Data
from fedlora.data.columns import Column, Kind, match, named, reader
from fedlora.data.labels import LabelError, label_ids
from fedlora.data.lists import as_lists, flat
from fedlora.data.names import name, number, unified
from fedlora.data.tables import Table, choices
from fedlora.errors import UserError
from fedlora.printable import quoted

Columns = dict[str, list[Any]]


def examples(table: Table, data: Data, columns: Sequence[Column], owners_needed: bool = True) -> Columns:
    """The task's columns, and user and task if configured, with all values validated.

    Labels remain names; numbers are replaced by the table's names for them. Without `owners_needed`, user and task may be
    missing.

    Raises:
        UserError: a column is missing, or a value is invalid; names the table, the column and the row, not the value.
    """
    if not table.names:
        raise UserError(f"{table.origin} has no examples")
    read = {column.name: reader(column.kind, table.folder) for column in columns}
    if missing := next((ours for ours in read if getattr(data, ours) is None), None):
        raise UserError(f"data.{missing}: the task needs this setting, the name of a column; set it")
    read |= {ours: named(ours) for ours in ("user", "task") if getattr(data, ours) is not None}
    for ours in () if owners_needed else ("user", "task"):
        if getattr(data, ours) not in table.names:
            read.pop(ours, None)
    for ours in read:
        if (column := getattr(data, ours)) not in table.names:
            raise UserError(f"{table.origin} has no column {quoted(column)} (data.{ours}){choices(column, table.names)}")
    found = {ours: _read(table, getattr(data, ours), ours, read_cell) for ours, read_cell in read.items()}
    if not size(found):
        raise UserError(f"{table.origin} has no examples")
    for column in columns:
        if column.of is not None:
            pairs, kind = zip(found[column.name], found[column.of], strict=True), column.kind
            found[column.name] = list(_checked(pairs, partial(_match, kind), where(table, data, column.name)))
    label = label_of(columns)
    for ours in found.keys() & {label, "user", "task"}:
        found[ours] = as_lists(unified(flat(found[ours])), found[ours])
    if label is not None and table.labels is not None:
        found[label] = _by_table(found[label], table.labels, where(table, data, label))
    return found


def size(columns: Columns) -> int:
    """The number of examples."""
    return len(next(iter(columns.values())))


def label_of(columns: Sequence[Column]) -> str | None:
    """The name of the column with the labels, one or a list for each example; None if the task has none."""
    return next((column.name for column in columns if column.kind in ("label", "tags")), None)


def where(table: Table, data: Data, ours: str) -> str:
    """The location of a column, for error messages."""
    return _place(table, getattr(data, ours), ours)


def row_of(error: LabelError, column: Sequence[Any], place: str) -> UserError:
    """An error about a label, reported for the first row that has it."""
    row = next(row for row, value in enumerate(column, 1) if error.label in flat([value]))
    return UserError(f"{place}: row {row} has a label that {error}")


def _by_table(column: list[Any], names: Sequence[str], place: str) -> list[Any]:
    """The labels, with numbers replaced by the table's names for them."""
    labels = flat(column)
    try:
        ids = label_ids([label for label in labels if number(label) is not None], names)
    except LabelError as error:
        raise row_of(error, column, place) from None
    return as_lists([name(names[ids[label]]) if label in ids else label for label in labels], column)


def _match(kind: Kind, pair: tuple[Any, Any]) -> Any:
    return match(kind, *pair)


def _read(table: Table, column: str, ours: str, read: Callable[[Any], Any]) -> list[Any]:
    place, values = _place(table, column, ours), table.column(column)
    if values is None:
        raise UserError(f"{place}: several columns have this name; rename or remove all but one")
    return list(_checked(values, read, place))


def _checked(values: Iterable[Any], read: Callable[[Any], Any], place: str) -> Iterable[Any]:
    for row, value in enumerate(values, 1):
        try:
            yield read(value)
        except ValueError as error:
            raise UserError(f"{place}: row {row} {error}; fix or remove the row, or choose another column") from None


def _place(table: Table, column: str, ours: str) -> str:
    return f"{table.origin}, column {quoted(column)} (data.{ours})"
