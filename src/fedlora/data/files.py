"""Tables in local files: JSON Lines, CSV and Parquet, read without guessing at types."""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import csv, parquet

from fedlora.errors import UserError

ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".csv", ".csv.gz", ".parquet")


def looks_local(name: str) -> bool:
    """Whether a data source can only be meant as a file, or is one."""
    return name.startswith((".", "/", "~")) or name.endswith(ENDINGS) or Path(name).is_file()


def columns(path: Path, key: str) -> dict[str, list[Any]]:
    """The columns of a file, all of one length; None where a JSON object lacks a key.

    Values are as the file has them: from CSV, which has no types, they are text.

    Raises:
        UserError: no such file, an unknown ending, or not readable; names the file and `key`, which it came from.
    """
    if not path.is_file():
        what = "is a folder; name a file in it" if path.is_dir() else "no such file"
        raise UserError(f"{key} = {str(path)!r}: {what}")
    if not path.name.endswith(ENDINGS):
        raise UserError(f"{key} = {str(path)!r}: unknown kind of file; expected {', '.join(ENDINGS)}")
    try:
        if path.suffix == ".parquet":
            return _plain(parquet.read_table(path))
        return _csv(path) if path.name.endswith((".csv", ".csv.gz")) else _json(path)
    except (OSError, EOFError, ValueError, zlib.error, pa.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{key} = {str(path)!r}: not readable: {reason}; is it whole, and what its ending says?") from error


def _plain(table: pa.Table) -> dict[str, list[Any]]:
    return {name: table.column(name).to_pylist() for name in table.column_names}


def _csv(path: Path) -> dict[str, list[Any]]:
    parse = csv.ParseOptions(newlines_in_values=True)
    read = csv.ReadOptions(block_size=1 << 26)  # a row must fit into a block
    names = csv.open_csv(path, read, parse).schema.names
    text = csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
    return _plain(csv.read_csv(path, read, parse, text))


def _json(path: Path) -> dict[str, list[Any]]:
    """Of one object a line, or of one list of objects."""
    with gzip.open(path, "rt", encoding="utf-8-sig") if path.suffix == ".gz" else path.open(encoding="utf-8-sig") as file:
        if file.read(1) == "[":
            rows = json.loads("[" + file.read())
        else:
            file.seek(0)
            rows = [_line(number, line) for number, line in enumerate(file, 1) if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected JSON objects, one for each example")
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def _line(number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number} is not JSON: {error.msg}") from None
