"""Parser for CSV text according to RFC 4180, as spreadsheets write it."""

import csv
import io
from collections.abc import Iterator


def columns(text: str) -> dict[str, list[str] | None]:
    """The columns, by the names in the first line; None for a name shared by several columns.

    Empty lines are ignored. Trailing columns without a name, which spreadsheets write, may be missing in a row.

    Raises:
        ValueError: a row of another width, an unclosed quote, or text after a closing quote; names the line.
    """
    rows = _rows(text)
    names = [name.strip() for name in next(rows, (1, []))[1]]
    width = max((place for place, name in enumerate(names, 1) if name), default=0)
    table = []
    for line, row in rows:
        if len(row) < width or any(row[len(names) :]):
            raise ValueError(
                f"line {line} has {len(row)} values for the {width} columns named in the first line; "
                "a value with a comma or a line end must be quoted"
            )
        table.append(row[:width])
    values = [list(column) for column in zip(*table, strict=True)] or [[] for _ in names]
    return {name: values[place] if names.count(name) == 1 else None for place, name in enumerate(names[:width]) if name}


def _rows(text: str) -> Iterator[tuple[int, list[str]]]:
    """Yields each nonempty row with the line on which it begins."""
    longest = csv.field_size_limit(len(text) + 1)  # the module's own limit is 128 kB
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        line = 1
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:
                what = "a quote is never closed" if "end of data" in str(error) else "text after a closing quote"
                where = f"line {line}" if reader.line_num <= line else f"lines {line} to {reader.line_num}"
                raise ValueError(f"{where}: {what}; quote such a value as a whole, and double the quotes in it") from None
            if row is None:
                return
            if row:
                yield line, row
            line = reader.line_num + 1
    finally:
        csv.field_size_limit(longest)
