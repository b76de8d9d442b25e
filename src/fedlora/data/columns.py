"""The columns that a task reads, and what their values may be."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from fedlora.data.images import image_reader
from fedlora.data.names import encodable, name, number

Kind = Literal["text", "number", "label", "image", "messages"]
"""text: not empty. number: finite, a float. label: a name, of which the examples get the index among the run's labels.
image: an image, of which the examples get the bytes of a file, see `image_reader`. messages: a list of mappings with the
texts `role` and `content`, at least one by the assistant."""

_LARGEST = 3.4028234663852886e38  # the largest number in fp32


@dataclass(frozen=True)
class Column:
    """A column of the examples. The setting of this name in `[data]` has the column's name in the file."""

    name: str
    kind: Kind


def reader(kind: Kind, folder: Path | None = None) -> Callable[[Any], Any]:
    """The function that validates the value of a cell; `folder` is that of the table's file, if it is one.

    It raises a ValueError whose message completes "row 3 ...", without the value.
    """
    return image_reader(folder) if kind == "image" else _READERS[kind]


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
    found = [_message(one) for one in (value if isinstance(value, Sequence) and not isinstance(value, str) else [value])]
    if not any(one["role"] == "assistant" for one in found):
        raise ValueError("has no message by the assistant")
    if any(one["role"] == "assistant" and not one["content"].strip() for one in found):
        raise ValueError("has an empty message by the assistant")
    return found


def _message(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(isinstance(value.get(key), str) for key in ("role", "content")):
        raise ValueError("is not a list of messages, each with the texts 'role' and 'content'")
    return {key: encodable(value[key]) for key in ("role", "content")}


_READERS: Mapping[Kind, Callable[[Any], Any]] = {
    "text": _text,
    "number": _number,
    "label": named("label"),
    "messages": _messages,
}
