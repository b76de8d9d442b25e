"""The labels of a run, and the index of each example's label: one rule for all files of a run (docs/data.md)."""

from collections.abc import Collection, Mapping, Sequence
from decimal import Decimal

from fedlora.data.names import is_code, name, number, whole

_MANY = 100  # this number of labels is always accepted


class LabelError(ValueError):
    """An invalid label. The message completes "a label that ...", without `label` itself, which is data."""

    def __init__(self, label: str, reason: str) -> None:
        super().__init__(reason)
        self.label = label


def given_labels(names: Sequence[str]) -> tuple[str, ...]:
    """The configured label names, without surrounding whitespace.

    Raises:
        ValueError: a name is empty or cannot be encoded, or two are equal.
    """
    keys = [name(each) for each in names]
    if not all(keys):
        raise ValueError(f"name {keys.index('') + 1} is empty")
    if len(set(keys)) < len(keys) or _written_twice(keys):
        raise ValueError("two names are the same, or the same number")
    return tuple(each.strip() for each in names)


def found_labels(train: Sequence[str], test: Sequence[str]) -> tuple[str, ...]:
    """The labels that occur, if no names are configured, sorted: numbers by size, else text by code point.

    Raises:
        LabelError: a label is ambiguous.
        ValueError: the training set has one label, or nearly as many labels as examples.
    """
    trained = set(train)
    labels = trained | set(test)
    if len(trained) < 2:
        raise ValueError("all examples have the same label; expected two labels or more")
    if len(trained) > max(_MANY, len(train) // 2):
        raise ValueError(
            f"{len(trained)} labels for {len(train)} examples; choose another column, or name the labels in data.labels"
        )
    numbers = {number(label) is not None for label in trained}
    if other := min((label for label in labels - trained if (number(label) is not None) not in numbers), default=None):
        kinds = "name, the training set has numbers" if number(other) is None else "number, the training set has names"
        raise LabelError(other, f"is a {kinds}; name the labels in data.labels, in order")
    if twice := _written_twice(labels):
        raise LabelError(twice, "is a number that other examples write differently; write it consistently")
    if "-1" in labels and labels != {"-1", "1"}:
        raise LabelError(
            "-1",
            "is -1, which often marks an example without a label; remove such examples, or name all labels in data.labels",
        )
    if any(number(label) is None or is_code(label) for label in labels):
        return tuple(sorted(labels))
    for label in sorted(labels):
        if whole(label) is None:
            raise LabelError(
                label, "is a fraction, not a name or a whole number; if these are codes, list them in data.labels"
            )
    return tuple(sorted(labels, key=int))


def label_ids(labels: Sequence[str], names: Sequence[str]) -> Mapping[str, int]:
    """The index of each of these labels among the names.

    A label that is a name has the index of that name. A number is compared to the names if any name is a number;
    otherwise it is the index, counted from 0.

    Raises:
        LabelError: a label is not among the names.
    """
    by_name = {name(each): index for index, each in enumerate(names)}
    by_number: dict[Decimal | None, int] = {
        value: index for index, each in enumerate(names) if (value := number(each)) is not None
    }
    by_index: dict[str | None, int] = {} if by_number else {str(index): index for index in range(len(names))}
    ids = {}
    for label in dict.fromkeys(labels):
        found = (by_name.get(label), by_number.get(number(label)), by_index.get(whole(label)))
        if (index := next((index for index in found if index is not None), None)) is None:
            numbers = ", which are numbers themselves and not counted from 0" if by_number else ""
            raise LabelError(
                label, f"is not among the {len(names)} names of the labels{numbers}; correct it, or complete data.labels"
            )
        ids[label] = index
    return ids


def _written_twice(labels: Collection[str]) -> str | None:
    """A label that is the same number as another label in a different notation; None if there is none."""
    seen = set()
    for label in sorted(labels):
        value = number(label)
        if value is not None and value in seen:
            return label
        seen.add(value)
    return None
