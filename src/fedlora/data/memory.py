"""Tables passed from Python: lists of mappings, data sets, data frames, and splits of these."""

import sys
from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np

from fedlora.data.tables import Table, of_dataset, of_splits, with_test_file
from fedlora.errors import UserError

MEMORY = "memory"
"""The `data.source` of a run whose rows were passed from Python."""

_TABLES = "a list of mappings, a datasets.Dataset, a pandas.DataFrame"
_EXPECTED = f"expected {_TABLES}, or a mapping of the splits train and test"
EXPECTED_TABLE = f"expected the name of a file, {_TABLES}"


def find(rows: Any, test: str | None, label: str | None) -> tuple[Table, Table | None]:
    """The training table, and the test table if the rows have splits or `test` names a file; see `tables.find`.

    Raises:
        UserError: the rows have an unsupported type, or the split or file does not exist.
    """
    if isinstance(rows, Mapping):  # datasets.DatasetDict is one
        return of_splits(rows, lambda split: table(rows[split], f"data[{split!r}]", label), test, "data")
    return with_test_file(table(rows, "data", label), test)


def table(rows: Any, origin: str, label: str | None, expected: str = _EXPECTED) -> Table:
    """The table of these rows; `expected` is the end of the message about rows of an unsupported type.

    Raises:
        UserError: the rows have an unsupported type.
    """
    origin = f"{origin} ({type(rows).__name__})"
    if isinstance(rows, datasets.Dataset):
        return of_dataset(rows.with_format(None), label, origin)
    if (pandas := sys.modules.get("pandas")) is not None and isinstance(rows, pandas.DataFrame):
        return _of_frame(rows, origin)
    if not isinstance(rows, list | tuple):
        raise UserError(f"{origin}: {expected}")
    if (wrong := next((i for i, row in enumerate(rows, 1) if not isinstance(row, Mapping)), None)) is not None:
        raise UserError(f"{origin}: row {wrong} is of type {type(rows[wrong - 1]).__name__}; {expected}")
    names = list(dict.fromkeys(str(name) for row in rows for name in row))
    return Table(origin, names, lambda name: [_plain(row.get(name)) for row in rows])


def _of_frame(frame: Any, origin: str) -> Table:
    """The columns of a data frame, without its index; missing values are None."""
    names = [str(name) for name in frame.columns]

    def column(name: str) -> list[Any] | None:
        if names.count(name) > 1:
            return None
        values = frame.iloc[:, names.index(name)]
        return [None if missing else _plain(value) for value, missing in zip(values, values.isna(), strict=True)]

    return Table(origin, names, column)


def _plain(value: Any) -> Any:
    """Converts a NumPy scalar to the Python type."""
    return value.item() if isinstance(value, np.generic) else value
