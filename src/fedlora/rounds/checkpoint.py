"""A run's folder: what survives a crash, and who may write in it."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from filelock import FileLock, Timeout

from fedlora.adapter import Adapter
from fedlora.errors import UserError
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo
from fedlora.rounds import durable
from fedlora.rounds.codec import decode_state, encode_state

DEPLOY = "deploy"
"""The folder in a run's folder for what is about a run with clients on other machines."""


class RunFolder:
    """The folder of one run, locked for this process.

    experiment.toml      the resolved experiment
    environment.json     versions, and which way the clients train
    rounds.jsonl         one row for each complete round
    checkpoint.safetensors   the server's state after the last complete round: its replacement is the commit
    clients/ID/ROUND.safetensors   states of clients that have any
    folds/ROUND.safetensors   changes of the base, for methods that make any

    Rows, client states and folds are written before the commit; after a crash those of later rounds are written again.
    """

    def __init__(self, path: Path, seconds: float = 0.0) -> None:
        """Locks the folder, which must exist; waits so long for another process to let go of it.

        Raises:
            UserError: it does not exist, cannot be written, or another process has it.
        """
        self.path = path
        self.experiment = path / "experiment.toml"
        self._checkpoint = path / "checkpoint.safetensors"
        self._rows = path / "rounds.jsonl"
        self._lock = FileLock(path / "lock")
        if not path.is_dir():
            raise UserError(f"{path}: no such run directory")
        try:
            self._lock.acquire(timeout=seconds)
        except Timeout:
            raise UserError(
                f"{path}: another process is running in this directory; wait for it or choose another"
            ) from None
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from error

    @classmethod
    def create(cls, path: Path) -> "RunFolder":
        """A new folder, locked.

        Raises:
            UserError: it has been used before, or cannot be made.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path}: cannot be made: {error.strerror}; choose another directory with --out") from error
        _refuse_if_used(path)
        folder = cls(path)
        try:
            _refuse_if_used(path)  # another process may have been quicker
        except UserError:
            folder.release()
            raise
        return folder

    def release(self) -> None:
        """Gives the lock back; removes the folder if nothing else was ever written to it."""
        unused = [entry.name for entry in self.path.iterdir()] == ["lock"]
        if unused:
            (self.path / "lock").unlink()
        self._lock.release()
        if unused:
            self.path.rmdir()

    def record(self, name: str, content: str) -> None:
        """Writes one of the small text files."""
        durable.replace(self.path / name, content.encode())

    def commit(self, rounds_done: int, server: Any, row: Mapping[str, Any]) -> None:
        """Makes a round complete.

        Raises:
            RunStopped: the disk is full; the round before stays complete.
        """
        durable.append(self._rows, (json.dumps(_plain(row), allow_nan=False) + "\n").encode())
        durable.replace(self._checkpoint, encode_state(server, rounds_done=rounds_done))

    def restore(self) -> tuple[int, Any]:
        """How many rounds are complete, and the server's state after them (None before the first); cuts later rows off.

        Raises:
            UserError: the checkpoint cannot be read.
        """
        if not self._checkpoint.exists():
            done, server = 0, None
        else:
            server, notes = _read(self._checkpoint)
            done = notes["rounds_done"]
        if self._rows.exists():
            durable.replace(self._rows, b"".join(self._rows.read_bytes().splitlines(keepends=True)[:done]))
        return done, server

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the complete rounds, after `restore` or `commit`."""
        return [json.loads(line) for line in self._rows.read_text().splitlines()] if self._rows.exists() else []

    def client_state(self, who: ClientInfo, before: int) -> Any | None:
        """The client's state after the last round of index below `before` that left one; None if there is none."""
        found = [index for index in self._saved(who) if index < before]
        return _read(self._client_file(who, max(found)))[0] if found else None

    def save_client(self, who: ClientInfo, index: int, state: Any) -> None:
        """Writes the client's state after the round of this index; keeps the two before it.

        The round before may not be complete yet, nor will it be if its server dies (see `loop.play`).

        Raises:
            RunStopped: the disk is full.
        """
        file = self._client_file(who, index)
        durable.folder(file.parent)
        durable.replace(file, encode_state(state))
        earlier = sorted(i for i in self._saved(who) if i < index)
        for old in earlier[:-2]:
            self._client_file(who, old).unlink()

    def save_fold(self, index: int, fold: Adapter) -> None:
        """Writes a change of the base; it counts once its round is complete.

        Raises:
            RunStopped: the disk is full.
        """
        durable.folder(self._fold_file(index).parent)
        durable.replace(self._fold_file(index), encode_state(fold))

    def fold(self, index: int) -> Mapping[str, LowRank]:
        """The change of the base that the round of this index made."""
        found: Mapping[str, LowRank] = _read(self._fold_file(index))[0]
        return found

    def folds(self) -> list[int]:
        """The indices of the rounds that left a fold, in order; those after the last complete round included."""
        return sorted(int(file.stem) for file in (self.path / "folds").glob("*.safetensors"))

    def forget(self, done: int) -> None:
        """Removes the folds and the clients' states of all rounds but the first `done`."""
        for file in [*self.path.glob("folds/*.safetensors"), *self.path.glob("clients/*/*.safetensors")]:
            if int(file.stem) >= done:
                file.unlink()

    def _fold_file(self, index: int) -> Path:
        return self.path / "folds" / f"{index}.safetensors"

    def _client_file(self, who: ClientInfo, index: int) -> Path:
        return self.path / "clients" / client_folder(who.id) / f"{index}.safetensors"

    def _saved(self, who: ClientInfo) -> list[int]:
        return [int(file.stem) for file in self._client_file(who, 0).parent.glob("*.safetensors")]


def _refuse_if_used(path: Path) -> None:
    if any(entry.name != "lock" and entry.suffix != ".partial" for entry in path.iterdir()):
        raise UserError(f"{path}: is not empty; go on with --resume {path}, or choose another directory with --out")


def _read(path: Path) -> tuple[Any, dict[str, Any]]:
    try:
        return decode_state(str(path))
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"the run is damaged: {error}") from error


def _plain(value: Any) -> Any:
    """The same without NaN and infinity, which JSON does not have."""
    match value:
        case Mapping():
            return {key: _plain(item) for key, item in value.items()}
        case float() if not math.isfinite(value):
            return None
    return value


def client_folder(client: str) -> str:
    """A folder's name for a client's id, whatever characters that has."""
    return quote(client, safe=" ").replace(".", "%2E")
