"""Markdown page of the round log, from the fields of a row and their docstrings.

    python -m fedlora.report.row_docs docs/rounds.md

writes the page.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from datetime import datetime
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from fedlora.config.reference import docstrings
from fedlora.rounds.row import VERSION, RoundRow, key

_INTRO = f"""\
<!-- written by scripts/pages -->

# Rows of the round log

`rounds.jsonl` in a run directory has one line of strict JSON for each complete round, of version {VERSION}. With
`evaluate.before`, the first line is that of round 0, the model before training. `Result.rows` has the same rows as objects
of `fedlora.rounds.row.RoundRow`, whose attributes have the names of the keys, except `global_` for `global`.

A number that is not finite is `null`, and NaN in Python. An absent value has no key, and is None or empty in Python. `*`
stands for any key: a client in `rejected`, `clipped`, `per_client`, `held_out` and `each`, else a metric. A line of another
version is rejected. The methods' own keys, such as `clusters` of fl-tac, are numbers; in Python they are in `notes`."""

_WORDS: Mapping[Any, str] = {int: "integer", float: "number", str: "text", datetime: "text"}


@dataclass(frozen=True)
class Entry:
    """A key of a row, its type in words, and its unit, meaning and absence, each empty if there is nothing to say."""

    key: str
    type: str
    unit: str
    meaning: str
    absent: str


def entries(cls: type = RoundRow, at: str = "") -> Iterator[Entry]:
    """All keys of a row, in its order; those of nested objects follow the object's own."""
    texts, hints = docstrings(cls), get_type_hints(cls)
    for one in fields(cls):
        if one.name == "notes":
            continue
        hint, name = _present(hints[one.name]), f"{at}{key(one.name)}"
        text, _, absent = " ".join(texts[one.name].split()).partition(" Absent: ")
        meaning, _, unit = text.partition(" Unit: ")
        yield Entry(name, _words(hint), unit.rstrip("."), meaning, absent)
        item = get_args(hint)[1] if get_origin(hint) is Mapping else hint
        if is_dataclass(item):
            assert isinstance(item, type)
            yield from entries(item, f"{name}." if item is hint else f"{name}.*.")


def page() -> str:
    """The page as Markdown."""
    lines = ["| key | type | unit | meaning | absent |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| `{one.key}` | {one.type} | {one.unit} | {one.meaning} | {one.absent} |" for one in entries()]
    return f"{_INTRO}\n\n" + "\n".join(lines) + "\n"


def _present(hint: Any) -> Any:
    """The type of a value that is not absent."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType] if get_origin(hint) in (Union, UnionType) else [hint]
    return kinds[-1]


def _words(hint: Any) -> str:
    hint = _present(hint)
    if get_origin(hint) is Sequence:
        return f"list of {_words(get_args(hint)[0])}"
    if get_origin(hint) is Mapping:
        return f"object of {_words(get_args(hint)[1])}s"
    return "object" if is_dataclass(hint) else _WORDS[hint]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
