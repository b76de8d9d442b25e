"""Parser for JSON text: one object per line, an array of objects, or an object of columns."""

import json
from typing import Any


def columns(text: str) -> dict[str, list[Any]]:
    """The columns, all of equal length; None for a key missing in an object. Empty lines are ignored.

    An object is read as columns if all its values are arrays, or all are objects keyed by row name, as pandas writes them.

    Raises:
        ValueError: not JSON, or an unsupported structure; names the line.
    """
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if len(lines) > 1 and _is_json(lines[0][1]):
        return _of_rows([_parsed(line, number) for number, line in lines])
    document = _parsed(text) if lines else []
    if isinstance(document, dict) and document:
        if all(isinstance(column, list) for column in document.values()):
            return _of_one_length(document)
        if all(isinstance(column, dict) for column in document.values()):
            rows = list(next(iter(document.values())))
            if any(column.keys() != set(rows) for column in document.values()):
                raise ValueError("the columns have different rows")
            return {name: [column[row] for row in rows] for name, column in document.items()}
    return _of_rows(document if isinstance(document, list) else [document])


def _of_rows(rows: list[Any]) -> dict[str, list[Any]]:
    for place, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"row {place} is not a JSON object; expected one for each example, or one of columns")
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def _of_one_length(document: dict[str, list[Any]]) -> dict[str, list[Any]]:
    if len({len(column) for column in document.values()}) > 1:
        raise ValueError("the columns have different lengths")
    return document


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(text: str, line: int = 1) -> Any:
    """Parses a text that begins on the given line."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {line + error.lineno - 1} is not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else error
        raise ValueError(f"line {line}: {reason}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a duplicate key")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
