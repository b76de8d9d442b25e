"""Log of a run's rounds, one row for each, in a JSON Lines file."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.errors import UserError
from fedlora.rounds import durable
from fedlora.rounds.row import RoundRow, from_json, to_json
from fedlora.runs.damage import damaged


@dataclass(frozen=True)
class RowLog:
    """The first `length` bytes of the file, and the state of their SHA-256; the file may have more after a crash."""

    path: Path
    length: int = 0
    sha256: Any = field(default_factory=hashlib.sha256)

    def append(self, row: RoundRow | None) -> "RowLog":
        """Writes a row, if any; returns the log with it.

        Raises:
            RunStopped: the disk is full.
        """
        line = b"" if row is None else (json.dumps(to_json(row), allow_nan=False) + "\n").encode()
        sha256 = self.sha256.copy()
        sha256.update(line)
        if line:
            durable.append(self.path, line)
        return RowLog(self.path, self.length + len(line), sha256)

    @classmethod
    def read(cls, path: Path, length: int, digest: str) -> "RowLog":
        """The first `length` bytes of the file, which must have this SHA-256.

        Raises:
            UserError: rows are missing or changed.
        """
        log = cls(path, length, hashlib.sha256(_start(path, length)))
        if log.sha256.hexdigest() != digest:
            raise log._damaged()
        return log

    @classmethod
    def restore(cls, path: Path, length: int, digest: str) -> "RowLog":
        """As `read`, but truncates the file to these bytes.

        Raises:
            UserError: rows are missing or changed, or from another version.
        """
        log = cls.read(path, length, digest)
        log.rows()  # before anything is trained
        if path.exists() and path.stat().st_size > length:
            durable.replace(path, _start(path, length))
        return log

    def rows(self) -> list[RoundRow]:
        """The rows.

        Raises:
            UserError: the file was changed since, or is from another version.
        """
        content = _start(self.path, self.length)
        if hashlib.sha256(content).digest() != self.sha256.digest():
            raise self._damaged()
        return [self._row(number, line) for number, line in enumerate(content.splitlines(), 1)]

    def _row(self, number: int, line: bytes) -> RoundRow:
        try:
            return from_json(json.loads(line))
        except ValueError as error:
            raise UserError(f"{self.path}: line {number}: {error}") from error

    def _damaged(self) -> Exception:
        return damaged(f"{self.path}: the rows of the complete rounds are missing or changed")


def _start(path: Path, length: int) -> bytes:
    """The file's first `length` bytes, fewer if it is shorter or missing."""
    return path.read_bytes()[:length] if path.exists() else b""
