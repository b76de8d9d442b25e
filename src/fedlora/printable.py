"""Names and untrusted texts in messages: client ids, labels, column and file names, reasons."""

import math
import re
from collections.abc import Sequence

_UNPRINTABLE = re.compile(r"[^ -~]")
_LONGEST = 40  # characters of a quoted name


def printable(text: str) -> str:
    r"""Escapes all characters that a terminal would interpret or hide.

    Covers control characters, line ends, bidirectional overrides and lone surrogates, as `repr` does, without its quotes.

    >>> print(printable("a\x1b[2Jb\nÄ\u202e"))
    a\x1b[2Jb\nÄ\u202e
    """
    return _UNPRINTABLE.sub(lambda match: _escape(match[0]), text)


def quoted(name: object) -> str:
    """Quotes and escapes an untrusted name from a file or a setting, truncated to 40 characters."""
    text = str(name)
    return repr(text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…")


def listed(names: Sequence[str], most: int) -> str:
    """The first `most` names and the number of the others, for a message.

    >>> listed(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def counted(count: int, noun: str) -> str:
    """The number with its noun.

    >>> counted(1, "round"), counted(2, "round")
    ('1 round', '2 rounds')
    """
    return f"{count} {noun}" + ("" if count == 1 else "s")


def number(value: float, digits: int) -> str:
    """A metric with this number of decimal digits; `undefined` for NaN.

    >>> number(0.5, 3), number(float("nan"), 3)
    ('0.500', 'undefined')
    """
    return "undefined" if math.isnan(value) else f"{value:.{digits}f}"


def _escape(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
