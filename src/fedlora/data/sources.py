"""The examples of a run: a training and a test set with integer labels, from wherever the configuration says."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch

from fedlora import config
from fedlora.data.tables import STDLIB_DOCS, Table, find, nearest
from fedlora.errors import UserError
from fedlora.randomness import generator

_MOST_LABELS = 100_000  # beyond that, integers without names are surely no label numbers


@dataclass(frozen=True)
class Corpus:
    """Training and test examples with the columns text, text_pair, label and user; text_pair and user where asked for.

    Labels are indices into `labels`. `user` is text; the test set has it only where its source does.
    """

    train: datasets.Dataset
    test: datasets.Dataset
    labels: tuple[str, ...]


def load(data: config.Data, seed: int) -> Corpus:
    """The examples that `data` describes; the same ones for the same seed.

    Labels are integers or text. Text is numbered in alphabetical order; integers are named by the hub's ClassLabel, by a
    list `labels.json` beside the training file, or by themselves. Training and test set are checked whole, before `rows`
    and `test_rows` are drawn.

    Raises:
        UserError: nothing there, not readable, or an example without text or label; names the file, the key and the value.
    """
    if data.source == STDLIB_DOCS:
        data = data.model_copy(update={"text": "text", "text_pair": None, "label": "label", "user": "user"})
    if data.source == "none":
        empty = datasets.Dataset.from_dict({"text": [], "label": []})
        return Corpus(empty, empty, tuple(data.labels or ()))
    table, test_table = find(data.source, data.test, data.label)
    train = _examples(table, data)
    names, index = _named(data.labels) if data.labels else _numbering(train["label"], table)
    train["label"] = _numbered(train["label"], index, table)
    if test_table is None:
        train, test = _split(train, data.test_fraction, seed)
    else:
        test = _examples(test_table, data, owners_needed=False)
        test["label"] = _numbered(test["label"], index, test_table)
    return Corpus(
        train=datasets.Dataset.from_dict(_draw(train, data.rows, seed, "rows")),
        test=datasets.Dataset.from_dict(_draw(test, data.test_rows, seed, "test rows")),
        labels=names,
    )


def load_own(data: config.Data, file: str, labels: Sequence[str], seed: int) -> datasets.Dataset:
    """All examples of one client's own file, with the columns of `load`; its labels are among those of the run.

    Raises:
        UserError: not readable, an example without text or label, or a label that the run does not have.
    """
    table, _ = find(file, None, data.label)
    columns = _examples(table, data.model_copy(update={"user": None, "task": None}))
    columns["label"] = _numbered(columns["label"], _named(labels)[1], table)
    return datasets.Dataset.from_dict(_draw(columns, data.rows, seed, "rows"))


def _named(labels: Sequence[str]) -> tuple[tuple[str, ...], Mapping[str, int]]:
    """Names that were given, and their numbers; examples may have the one or the other."""
    return tuple(labels), {**{str(i): i for i in range(len(labels))}, **{name: i for i, name in enumerate(labels)}}


def _examples(table: Table, data: config.Data, owners_needed: bool = True) -> dict[str, list[Any]]:
    """The columns by our names, every value checked; labels still as text."""
    if not table.names:
        raise UserError(f"{table.origin} has no examples")
    checks = {"text": _text, "text_pair": _text, "label": _label, "user": _user, "task": _task}
    wanted = {ours: name for ours in checks if (name := getattr(data, ours)) is not None}
    for ours in () if owners_needed else ("user", "task"):
        if getattr(data, ours) not in table.names:
            wanted.pop(ours, None)
    for ours, name in wanted.items():
        if name not in table.names:
            raise UserError(f"{table.origin} has no column {name!r} (data.{ours}){nearest(name, table.names)}")
    columns = {}
    for ours, name in wanted.items():
        try:
            columns[ours] = [checks[ours](value, row) for row, value in enumerate(table.column(name), 1)]
        except ValueError as error:
            raise UserError(f"{table.origin}, column {name!r} (data.{ours}): {error}") from None
    if not columns["text"]:
        raise UserError(f"{table.origin} has no examples")
    return columns


def _text(value: Any, row: int) -> str:
    if isinstance(value, str) and value.strip():
        return value
    came = "is empty" if value is None or isinstance(value, str) else f"is {value!r}, not text"
    raise ValueError(f"row {row} {came}; mend or remove the row, or choose another column")


def _label(value: Any, row: int) -> str:
    if value is None or value == "":
        raise ValueError(f"row {row} has no label; label or remove the row, or choose another column")
    if isinstance(value, int) and value < 0:
        raise ValueError(f"row {row} has label {value}; labels count from 0 (-1 marks a split without labels)")
    if not isinstance(value, int | str):
        raise ValueError(f"row {row} has label {value!r}; expected an integer or text")
    return str(value)


def _user(value: Any, row: int) -> str:
    if value is None or value == "":
        raise ValueError(f"row {row} has no user; name one or remove the row, or choose another column")
    return str(value)


def _task(value: Any, row: int) -> str:
    if value is None or value == "":
        raise ValueError(f"row {row} has no task; name one or remove the row, or choose another column")
    return str(value)


def _numbering(labels: list[str], table: Table) -> tuple[tuple[str, ...], Mapping[str, int]]:
    """The names of the labels, and the number of each label that occurs."""
    present = sorted(set(labels))
    if len(present) < 2:
        raise UserError(f"{table.origin}: all examples have the label {present[0]!r}; expected two labels or more")
    if not all(re.fullmatch("0|[1-9][0-9]*", label) for label in present):
        return tuple(present), {label: i for i, label in enumerate(present)}
    largest = max(map(int, present))
    names = table.labels or tuple(str(i) for i in range(min(largest + 1, _MOST_LABELS)))
    if largest >= len(names):
        raise UserError(f"{table.origin}: label {largest} is too large; there are {len(names)} labels, from 0 on")
    return names, {label: int(label) for label in present}


def _numbered(labels: list[str], index: Mapping[str, int], table: Table) -> list[int]:
    unknown = next((label for label in labels if label not in index), None)
    if unknown is not None:
        raise UserError(f"{table.origin}: label {unknown!r} does not occur in the training set; remove these examples")
    return [index[label] for label in labels]


def _split(columns: dict[str, list[Any]], fraction: float, seed: int) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    rows = len(columns["label"])
    order = torch.randperm(rows, generator=generator(seed, "test split")).tolist()
    count = min(max(round(fraction * rows), 1), rows - 1)
    return _rows(columns, order[count:]), _rows(columns, order[:count])


def _draw(columns: dict[str, list[Any]], count: int | None, seed: int, purpose: str) -> dict[str, list[Any]]:
    rows = len(columns["label"])
    if count is None or count >= rows:
        return columns
    return _rows(columns, torch.randperm(rows, generator=generator(seed, purpose)).tolist()[:count])


def _rows(columns: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
    return {name: [values[row] for row in sorted(rows)] for name, values in columns.items()}
