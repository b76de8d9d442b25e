"""Tables in local files: JSON, CSV, Parquet and NumPy arrays, read without type inference."""

import codecs
import gzip
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from fedlora.data import csv_rows, json_rows, npz_rows
from fedlora.errors import UserError
from fedlora.paths import ENDINGS


def columns(path: Path, key: str) -> dict[str, Any]:
    """The columns of a file as lists of equal length, by name; None for a name shared by several columns.

    Values keep the types of the file: CSV, which has no types, gives text; a key missing in a JSON object gives None.

    Raises:
        UserError: no such file, an unknown extension, or not readable; names the file, the line and the setting `key`.
    """
    if not path.is_file():
        what = "is a folder; name a file in it" if path.is_dir() else "no such file"
        raise UserError(f"{key} = {str(path)!r}: {what}")
    ending = next((ending for ending in ENDINGS if path.name.lower().endswith(ending)), None)
    if ending is None:
        raise UserError(f"{key} = {str(path)!r}: unsupported file type; expected {', '.join(ENDINGS)}")
    try:
        if ending == ".parquet":
            return _parquet(path)
        if ending == ".npz":
            return {**npz_rows.columns(path)}
        text = _text(path, ending)
        return {**csv_rows.columns(text)} if ".csv" in ending else json_rows.columns(text)
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, pa.ArrowException) as error:
        reason = str(error).partition("\n")[0][:200]
        raise UserError(
            f"{key} = {str(path)!r}: not readable: {reason}; check that it is complete and has the right extension"
        ) from error
    except ValueError as error:
        raise UserError(f"{key} = {str(path)!r}: not readable: {error}") from None


def _parquet(path: Path) -> dict[str, Any]:
    # not read_table: it interprets a folder named `key=value` as a column, and rejects duplicate column names
    with parquet.ParquetFile(path) as file:
        table = file.read()
    names = table.column_names
    return {name: table.column(i).to_pylist() if names.count(name) == 1 else None for i, name in enumerate(names)}


def _text(path: Path, ending: str) -> str:
    """The content of a UTF-8 file, without its byte order mark."""
    content = path.read_bytes()
    if ending.endswith(".gz"):
        content = gzip.decompress(content)
    content = content.removeprefix(codecs.BOM_UTF8)
    try:
        text, wrong = (
            content.decode(),
            content.find(b"\0"),
        )  # UTF-16 without a BOM can be decoded as UTF-8, with NUL characters
    except UnicodeDecodeError as error:
        text, wrong = "", error.start
    if wrong >= 0:
        line = content.count(b"\n", 0, wrong) + 1
        raise ValueError(f"line {line} is not UTF-8; save it as UTF-8")
    return text
