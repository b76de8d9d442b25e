"""Raw tables: data sets of the standard library, local files, and data sets on the hub."""

import inspect
import json
import sys
import sysconfig
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from fedlora.cache import cached
from fedlora.config.hints import closest
from fedlora.data import files, stdlib_docs, stdlib_signatures, stdlib_sources
from fedlora.data.labels import given_labels
from fedlora.errors import UserError
from fedlora.paths import looks_local
from fedlora.printable import listed, quoted

STDLIB_DOCS = "stdlib-docs"
_BUILT_IN = {STDLIB_DOCS: stdlib_docs, "stdlib-signatures": stdlib_signatures}
_SHOWN = 10  # columns in a message


@dataclass(frozen=True)
class Table:
    """Named columns, not validated.

    `origin` is the setting and value that specify the table, `labels` the label names, by number, if known, `folder` that
    of the file, if it is one. `column` returns None for a name shared by several columns.
    """

    origin: str
    names: Sequence[str]
    column: Callable[[str], Iterable[Any] | None]
    labels: tuple[str, ...] | None = None
    folder: Path | None = None


def find(source: str, test: str | None, label: str | None) -> tuple[Table, Table | None]:
    """The training table, and the test table if the source has one or `test` names one.

    `label` is the column for which the hub may have class names, if any.

    Raises:
        UserError: no such file, data set or split, or not readable.
    """
    if source in _BUILT_IN:
        return with_test_file(_built_in(source), test)
    if not looks_local(source):
        return _hub(source, test, label)
    return with_test_file(of_file(source, "data.source"), test)


def choices(word: str, allowed: Iterable[str]) -> str:
    """The end of a message about an unknown word: the closest valid word, and all valid words, escaped."""
    names = list(allowed)
    near = closest(word, names)
    hint = f"; did you mean {quoted(near)}?" if near else ";"
    return f"{hint} available: {listed(list(map(quoted, names)), _SHOWN)}"


def _built_in(source: str) -> Table:
    module = _BUILT_IN[source]
    code = [inspect.getsource(one) for one in (stdlib_sources, module)]
    key = [sys.version, sysconfig.get_paths()["stdlib"], *code]
    rows = json.loads(cached(source, key, lambda: json.dumps(module.examples()).encode()))
    return Table(f"data.source = {source!r}", list(rows[0]) if rows else [], lambda name: [row[name] for row in rows])


def of_file(name: str, key: str) -> Table:
    """The table in a file, named by the setting `key`.

    Raises:
        UserError: no such file, or not readable.
    """
    path = Path(name).expanduser()
    columns = files.columns(path, key)
    labels = _label_names(path.parent / "labels.json")
    return Table(f"{key} = {str(path)!r}", list(columns), columns.__getitem__, labels, path.parent)


def _label_names(path: Path) -> tuple[str, ...] | None:
    if not path.is_file():
        return None
    try:
        names = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: expected a list of names, ordered by label number")
    try:
        return given_labels(names)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _hub(source: str, test: str | None, label: str | None) -> tuple[Table, Table | None]:
    name, _, subset = source.partition(":")
    try:
        with _no_progress_bars():
            splits = datasets.load_dataset(name, subset or None)
    except Exception as error:  # any error of the hub's client, the network or the data set's files
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise UserError(
            f"data.source = {source!r}: not loaded from the hub: {reason}; for a local file give its path, offline set "
            "HF_HUB_OFFLINE=1 to use what was downloaded before"
        ) from error
    origin = f"data.source = {source!r}"
    return of_splits(splits, lambda split: of_dataset(splits[split], label, f"{origin}, split {split!r}"), test, origin)


def of_splits(
    splits: Collection[str], table: Callable[[str], Table], test: str | None, origin: str
) -> tuple[Table, Table | None]:
    """The split `train`, and the test table: the split or file that `test` names, else the split `test` or `validation`.

    Raises:
        UserError: the split or file does not exist.
    """

    def named(split: str, key: str = "") -> Table:
        if split not in splits:
            raise UserError(f"{key}{origin} has no split {split!r}{choices(split, splits)}")
        return table(split)

    train = named("train")
    if test is not None and looks_local(test):
        return train, of_file(test, "data.test")
    found = test or next((split for split in ("test", "validation") if split in splits), None)
    return train, None if found is None else named(found, "data.test: ")


def with_test_file(train: Table, test: str | None) -> tuple[Table, Table | None]:
    """The table, which has no splits, and the test table in the file that `test` names.

    Raises:
        UserError: `test` does not name a file, or the file is not readable.
    """
    if test is None:
        return train, None
    if not looks_local(test):
        raise UserError(f"data.test = {test!r}: {train.origin} has no splits; name a file, or remove data.test")
    return train, of_file(test, "data.test")


def of_dataset(dataset: datasets.Dataset, label: str | None, origin: str) -> Table:
    """A data set's columns, with images as they are stored; the class names of the column `label`, if any, are the label
    names.

    Raises:
        UserError: two of these names are equal, or one is empty.
    """
    for name in [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]:
        dataset = dataset.cast_column(name, datasets.Image(decode=False))
    feature = dataset.features.get(label)
    names = getattr(getattr(feature, "feature", feature), "names", None)  # of a list: those of its elements
    if names is None:
        return Table(origin, dataset.column_names, lambda name: dataset[name][:])
    # a ClassLabel is an index into its names, even if these are numbers; -1 means no label
    name_of = dict(enumerate(names))
    try:
        labels = given_labels(names)
    except ValueError as error:
        raise UserError(f"{origin}, names of {quoted(label)}: {error}") from None
    return Table(
        origin,
        dataset.column_names,
        lambda name: [_named(value, name_of) for value in dataset[name]] if name == label else dataset[name][:],
        labels,
    )


def _named(value: Any, name_of: Mapping[Any, str]) -> Any:
    """The name of a class, or the names of those in a list."""
    return [name_of.get(one) for one in value] if isinstance(value, list) else name_of.get(value)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = not datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
