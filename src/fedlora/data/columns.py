"""The columns that a task reads, and what their values may be."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedlora.data.images import image_reader
from fedlora.data.names import encodable, name, number

Kind = Literal["text", "number", "label", "image", "messages", "conversation", "texts", "tags", "choice"]
"""text: not empty. number: finite, a float. label: a name, of which the examples get the index among the run's labels.
image: an image, of which the examples get the bytes of a file, see `image_reader`. messages: a list of mappings with the
texts `role` and `content`, at least one by the assistant. conversation: the same, also without one. texts: a list of
texts. tags: a list of labels, one for each element of another column. choice: an element of another column, by its index
or text; the examples get the index."""

_LARGEST = 3.4028234663852886e38  # the largest number in fp32


@dataclass(frozen=True)
class Column:
    """A column of the examples. The setting of this name in `[data]` has the column's name in the file."""

    name: str
    kind: Kind
    of: str | None = None
    """The column to whose lists the values belong, if any; see `match`."""
    target: bool = False
    """Whether the task learns to predict the values; examples to be predicted lack the column."""


def reader(kind: Kind, folder: Path | None = None) -> Callable[[Any], Any]:
    """The function that validates the value of a cell; `folder` is that of the table's file, if it is one.

    It raises a ValueError whose message completes "row 3 ...", without the value.
    """
    return image_reader(folder) if kind == "image" else _READERS[kind]


def match(kind: Kind, value: Any, others: Sequence[Any]) -> Any:
    """The value, which belongs to this list of another column.

    Raises:
        ValueError: it does not fit; the message is as for `reader`.
    """
    if kind == "tags" and len(value) != len(others):
        raise ValueError(f"has {len(value)} tags for {len(others)} words")
    return _index(value, others) if kind == "choice" else value


def named(what: str) -> Callable[[Any], str]:
    """The reader of names, called `what` in the message about a missing one."""

    def read(value: Any) -> str:
        if found := name(value):
            return found
        raise ValueError(f"has no {what}")

    return read


def _text(value: Any) -> str:
    if isinstance(value, str) and value.strip():
        return encodable(value)
    if value is None or isinstance(value, str) or value != value:
        raise ValueError("is empty")
    raise ValueError(f"is of type {type(value).__name__}, not text")


def _number(value: Any) -> float:
    found = number(value.strip()) if isinstance(value, str) else value
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        raise ValueError("has no number")
    if isinstance(value, bool) or not isinstance(found, int | float | Decimal):
        raise ValueError(f"is of type {type(value).__name__}, not a number")
    if not -_LARGEST <= found <= _LARGEST:
        raise ValueError("is infinite, or too large for single precision")
    return float(found)


def _messages(value: Any) -> list[dict[str, str]]:
    found = _conversation(value)
    if not any(one["role"] == "assistant" for one in found):
        raise ValueError("has no message by the assistant")
    return found


def _conversation(value: Any) -> list[dict[str, str]]:
    found = [_message(one) for one in (value if isinstance(value, Sequence) and not isinstance(value, str) else [value])]
    if any(one["role"] == "assistant" and not one["content"].strip() for one in found):
        raise ValueError("has an empty message by the assistant")
    return found


def _message(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(isinstance(value.get(key), str) for key in ("role", "content")):
        raise ValueError("is not a list of messages, each with the texts 'role' and 'content'")
    return {key: encodable(value[key]) for key in ("role", "content")}


def _list_of(read: Callable[[Any], Any]) -> Callable[[Any], list[Any]]:
    def read_all(value: Any) -> list[Any]:
        value = value.tolist() if isinstance(value, np.ndarray) else value  # as data frames have them
        if value is None or (isinstance(value, list | tuple | str) and not value):
            raise ValueError("is empty")
        if not isinstance(value, list | tuple):
            raise ValueError(f"is of type {type(value).__name__}, not a list; CSV has no lists, JSON and Parquet do")
        return [read(one) for one in value]

    return read_all


def _element(value: Any) -> str:
    try:
        return _text(value)
    except ValueError as error:
        raise ValueError(f"has an element that {error}") from None


def _choice(value: Any) -> int | str:
    if isinstance(value, bool) or (value is not None and not isinstance(value, int | str)):
        raise ValueError(f"is of type {type(value).__name__}, not an index or the text of an option")
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError("has no answer")
    return value


def _index(value: int | str, options: Sequence[str]) -> int:
    """The index of an option: as text if it is the text of one, else as a number, counted from 0."""
    if len(options) < 2:
        raise ValueError("has a single option; expected two or more")
    if (count := options.count(value)) > 1:
        raise ValueError(f"has an answer that is the text of {count} options")
    found = options.index(value) if isinstance(value, str) and count else number(str(value).strip())
    if found is None or found not in range(len(options)):
        raise ValueError(f"has an answer that is not among its {len(options)} options; expected the text or index of one")
    return int(found)


_READERS: Mapping[Kind, Callable[[Any], Any]] = {
    "text": _text,
    "number": _number,
    "label": named("label"),
    "messages": _messages,
    "conversation": _conversation,
    "texts": _list_of(_element),
    "tags": _list_of(named("tag")),
    "choice": _choice,
}
