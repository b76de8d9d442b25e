"""Columns whose values are lists, as one list of all their elements."""

from collections.abc import Sequence
from itertools import chain, islice
from typing import Any


def flat(column: Sequence[Any]) -> list[Any]:
    """The elements of all lists of the column; the values of a column without lists."""
    return list(chain.from_iterable(column)) if column and isinstance(column[0], list) else list(column)


def as_lists(values: Sequence[Any], column: Sequence[Any]) -> list[Any]:
    """The inverse of `flat`: the values as lists with the lengths of those of the column."""
    if not (column and isinstance(column[0], list)):
        return list(values)
    rest = iter(values)
    return [list(islice(rest, len(one))) for one in column]
