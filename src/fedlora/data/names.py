"""Reads names of labels, owners and tasks, the same from every format (docs/data.md)."""

import math
import re
from collections.abc import Sequence
from decimal import Decimal

_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,40}(?:\.[0-9]{0,40})?|\.[0-9]{1,40})(?:[eE][+-]?[0-9]{1,3})?")
_LEADING_ZERO = re.compile(r"[+-]?0[0-9]")


def name(value: object) -> str:
    """The name in a cell, without surrounding whitespace; empty if it is missing (null, NaN, or whitespace).

    Booleans are the names `true` and `false`, also as text in any capitalization.

    Raises:
        ValueError: the cell is not text, a number or a boolean; the message has the type, not the value.
    """
    if value is None:
        return ""
    if isinstance(value, str | bool):
        text = encodable(str(value)).strip()
        return text.lower() if text.lower() in ("true", "false") else text
    if isinstance(value, int | float | Decimal):
        if value != value:
            return ""
        if math.isfinite(value):
            return str(value)
        raise ValueError("is infinite; expected text or a whole number")
    raise ValueError(f"is of type {type(value).__name__}; expected text or a whole number")


def encodable(text: str) -> str:
    """Returns the text unchanged.

    Raises:
        ValueError: the text has an unpaired surrogate (it was cut within a character) and cannot be encoded.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("has an unpaired surrogate, as in text that was cut within a character") from None
    return text


def unified(names: Sequence[str]) -> list[str]:
    """The names of a column; if all are whole numbers, in canonical form: 1.0 and +1 become 1."""
    usual = {each: whole(each) for each in set(names)}
    return [usual[each] or each for each in names] if None not in usual.values() else list(names)


def number(name: str) -> Decimal | None:
    """The value of a name that is a number in any notation; None for other names."""
    return Decimal(name) if _NUMBER.fullmatch(name) else None


def is_code(name: str) -> bool:
    """Whether a number has leading zeros, and is thus a code."""
    return _LEADING_ZERO.match(name) is not None


def whole(name: str) -> str | None:
    """The canonical form of a name that is a whole number; None for other names, and for codes such as 007."""
    value = number(name)
    if value is None or is_code(name) or value != value.to_integral_value():
        return None
    return str(int(value))
