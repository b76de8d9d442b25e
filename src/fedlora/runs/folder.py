"""Run directory: crash-safe storage with exclusive access."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from filelock import FileLock, Timeout

from fedlora.adapter import Adapter
from fedlora.errors import RunStopped, UserError
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo
from fedlora.rounds import checksum, durable
from fedlora.rounds.codec import decode_state, encode_state

DEPLOY = "deploy"
"""Subfolder of a run's folder for files of a deployment."""

MANIFEST = "manifest.json"


class RunFolder:
    """Folder of one run, locked for this process.

    experiment.toml      the resolved experiment
    model/               the model, if a Python program passed it
    environment.json     versions, and settings of how clients are trained
    manifest.json        dependencies of the run; exists once the run has begun
    rounds.jsonl         one row for each complete round
    checkpoint.safetensors   the server's state after the last complete round: its replacement is the commit
    clients/ID/ROUND.safetensors   states of stateful clients
    base_updates/ROUND.safetensors   base updates, for methods that produce them

    Rows, client states and base updates are written before the commit; after a crash those of later rounds are
    written again. Each state, each base update and the manifest has a checksum. The checkpoint lists the required files,
    and the length and checksum of the rows, so that `restore` detects missing or damaged files.
    """

    def __init__(self, path: Path, seconds: float = 0.0) -> None:
        """Locks the folder, which must exist; waits up to `seconds` for another process to release it.

        Raises:
            UserError: it does not exist, cannot be written, or is locked by another process.
        """
        self.path = path
        self.experiment = path / "experiment.toml"
        self._checkpoint = path / "checkpoint.safetensors"
        self._rows = path / "rounds.jsonl"
        self._lock = FileLock(path / "lock")
        self._run = ""  # the id in the manifest
        self._length, self._digest = 0, hashlib.sha256()  # of the rows of the complete rounds
        self._states: dict[str, int] = {}  # client -> complete round that saved its last state
        self._base_updates: list[int] = []  # of complete rounds
        self._new: list[tuple[int, str | None]] = []  # states (round, client) and base updates (round, None) of later ones
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
        self._directory = os.open(path, os.O_RDONLY)  # held open, so that its inode is not reused

    @classmethod
    def create(cls, path: Path) -> "RunFolder":
        """Creates and locks a new folder.

        Raises:
            UserError: it has been used before, or cannot be created.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path}: cannot be made: {error.strerror}; choose another directory with --out") from error
        _refuse_if_used(path)
        folder = cls(path)
        try:
            _refuse_if_used(path)  # another process may have used it meanwhile
        except UserError:
            folder.release()
            raise
        return folder

    def release(self) -> None:
        """Releases the lock; removes the folder if it contains nothing else."""
        unused = self._here() and [entry.name for entry in self.path.iterdir()] == ["lock"]
        if unused:
            (self.path / "lock").unlink()
        self._lock.release()
        os.close(self._directory)
        if unused:
            self.path.rmdir()

    def record(self, name: str, content: str) -> None:
        """Writes one of the small text files.

        Raises:
            RunStopped: the disk is full, or the folder no longer exists.
        """
        self.require()
        durable.replace(self.path / name, content.encode())

    def require(self) -> None:
        """Checks that the folder is still in place: it must not be recreated with only a part of the run.

        Raises:
            RunStopped: it was moved or removed.
        """
        if not self._here():
            raise RunStopped(f"{self.path}: the run directory was moved or removed; move it back, or resume it where it is")

    def begin(self, manifest: Mapping[str, Any], server: Any) -> None:
        """Writes the manifest, which has the entries `id` and `environment`, and the server's state before the first round.

        Raises:
            RunStopped: the disk is full.
        """
        self._run = manifest["id"]
        self.commit(0, server)
        self.change(manifest)

    def change(self, manifest: Mapping[str, Any]) -> None:
        """Replaces the manifest.

        Raises:
            RunStopped: the disk is full.
        """
        self.record(MANIFEST, _sealed(manifest))

    def commit(self, rounds_done: int, server: Any, row: Mapping[str, Any] | None = None) -> None:
        """Commits a round, or with 0 rounds the state before the first.

        Raises:
            RunStopped: the disk is full; the previous round stays complete.
        """
        self.require()
        line = b"" if row is None else (json.dumps(_plain(row), allow_nan=False) + "\n").encode()
        digest = self._digest.copy()
        digest.update(line)
        states, base_updates = dict(self._states), list(self._base_updates)
        for index, client in sorted((new for new in self._new if new[0] < rounds_done), key=lambda new: new[0]):
            if client is not None:
                states[client] = index
            elif index not in base_updates:
                base_updates.append(index)
        notes = {
            "rounds_done": rounds_done,
            "run": self._run,
            "rows": [self._length + len(line), digest.hexdigest()],
            "states": states,
            "base_updates": base_updates,
        }
        if line:
            durable.append(self._rows, line)
        durable.replace(self._checkpoint, encode_state(server, **notes))
        self._length, self._digest, self._states, self._base_updates = (
            self._length + len(line),
            digest,
            states,
            base_updates,
        )
        self._new = [new for new in self._new if new[0] >= rounds_done]

    def restore(self) -> tuple[int, Any]:
        """Number of complete rounds, and the server's state after them (None before `begin`); truncates later rows.

        Reads and checks all files that the run needs to resume.

        Raises:
            UserError: a file is missing or damaged.
        """
        manifest = read_manifest(self.path)
        self._run = "" if manifest is None else manifest["id"]
        if not self._checkpoint.exists():
            if manifest is not None or (self._rows.exists() and self._rows.stat().st_size):
                raise _missing(self._checkpoint)
            return 0, None
        server, notes = _read(self._checkpoint)
        if notes["run"] != self._run:
            if manifest is None and notes["rounds_done"]:
                raise _missing(self.path / MANIFEST)
            if manifest is not None:
                raise UserError(f"the run is damaged: {self._checkpoint} is of another run than {self.path / MANIFEST}")
        if manifest is not None:
            _require(self.path / "environment.json", manifest["environment"])
        self._states, self._base_updates, self._new = notes["states"], notes["base_updates"], []
        for client, index in self._states.items():
            _read(self._client_file(client, index))
        for index in self._base_updates:
            _read(self._fold_file(index))
        self._length = notes["rows"][0]
        self._digest = hashlib.sha256(content := self._complete_rows())
        if self._digest.hexdigest() != notes["rows"][1]:
            raise UserError(f"the run is damaged: {self._rows}: the rows of the complete rounds are missing or changed")
        if self._rows.exists() and self._rows.stat().st_size > self._length:
            durable.replace(self._rows, content)
        return notes["rounds_done"], server

    def rows(self) -> list[dict[str, Any]]:
        """Rows of the complete rounds, after `restore` or `commit`.

        Raises:
            UserError: they were changed since.
        """
        content = self._complete_rows()
        if hashlib.sha256(content).digest() != self._digest.digest():
            raise UserError(f"the run is damaged: {self._rows}: the rows of the complete rounds are missing or changed")
        return [json.loads(line) for line in content.splitlines()]

    def client_state(self, client: ClientInfo, before: int) -> Any | None:
        """Client's state saved in the last round with index below `before`; None if no round saved one.

        Raises:
            UserError: the state is damaged, or missing although listed in the checkpoint.
        """
        found = [index for index in self._saved(client.id) if index < before]
        if self._states.get(client.id, before) < before and self._states[client.id] not in found:
            raise _missing(self._client_file(client.id, self._states[client.id]))
        return _read(self._client_file(client.id, max(found)))[0] if found else None

    def save_client(self, client: ClientInfo, index: int, state: Any) -> None:
        """Writes the client's state after the round with this index; keeps the two previous states.

        The previous round may not be complete yet, and never completes if its server dies (see `loop.run_rounds`).

        Raises:
            RunStopped: the disk is full.
        """
        self.require()
        file = self._client_file(client.id, index)
        durable.folder(file.parent)
        durable.replace(file, encode_state(state))
        self._new.append((index, client.id))
        earlier = sorted(i for i in self._saved(client.id) if i < index)
        for old in earlier[:-2]:
            self._client_file(client.id, old).unlink()

    def save_base_update(self, index: int, base_update: Adapter) -> None:
        """Writes a base update; it becomes effective once its round is complete.

        Raises:
            RunStopped: the disk is full.
        """
        self.require()
        durable.folder(self._fold_file(index).parent)
        durable.replace(self._fold_file(index), encode_state(base_update))
        self._new.append((index, None))

    def base_update(self, index: int) -> Mapping[str, LowRank]:
        """Base update of the round with this index."""
        found: Mapping[str, LowRank] = _read(self._fold_file(index))[0]
        return found

    def base_updates(self) -> list[int]:
        """Indices of the rounds with a base update, in order, including rounds after the last complete one."""
        return sorted(int(file.stem) for file in (self.path / "base_updates").glob("*.safetensors"))

    def forget(self, done: int) -> None:
        """Removes the base updates and the clients' states of all rounds after the first `done`."""
        for file in [*self.path.glob("base_updates/*.safetensors"), *self.path.glob("clients/*/*.safetensors")]:
            if int(file.stem) >= done:
                file.unlink()

    def _fold_file(self, index: int) -> Path:
        return self.path / "base_updates" / f"{index}.safetensors"

    def _client_file(self, client: str, index: int) -> Path:
        return self.path / "clients" / client_folder(client) / f"{index}.safetensors"

    def _saved(self, client: str) -> list[int]:
        return [int(file.stem) for file in self._client_file(client, 0).parent.glob("*.safetensors")]

    def _complete_rows(self) -> bytes:
        return self._rows.read_bytes()[: self._length] if self._rows.exists() else b""

    def _here(self) -> bool:
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self._directory))
        except OSError:
            return False


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Manifest of the run in this folder, None if it has not begun.

    Raises:
        UserError: the file is damaged.
    """
    file = path / MANIFEST
    if not file.exists():
        return None
    content = file.read_bytes()
    if not checksum.intact(content):
        raise UserError(f"the run is damaged: {file}: its checksum is missing or wrong")
    return {key: value for key, value in json.loads(content).items() if key not in checksum.EMPTY}


def _sealed(manifest: Mapping[str, Any]) -> str:
    return checksum.sealed(json.dumps({**checksum.EMPTY, **manifest}, indent=1).encode()).decode()


def _refuse_if_used(path: Path) -> None:
    if any(entry.name != "lock" and entry.suffix != ".partial" for entry in path.iterdir()):
        raise UserError(f"{path}: is not empty; go on with --resume {path}, or choose another directory with --out")


def _read(path: Path) -> tuple[Any, dict[str, Any]]:
    try:
        return decode_state(str(path))
    except FileNotFoundError:
        raise _missing(path) from None
    except (ValueError, OSError) as error:
        raise UserError(f"the run is damaged: {error}") from error


def _require(path: Path, digest: str) -> None:
    """Checks that the file has this SHA-256."""
    if not path.exists():
        raise _missing(path)
    if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        raise UserError(f"the run is damaged: {path} is not as it was written")


def _missing(path: Path) -> UserError:
    return UserError(f"the run is damaged: {path} is missing")


def _plain(value: Any) -> Any:
    """The value with NaN and infinity replaced by None, as JSON does not support them."""
    match value:
        case Mapping():
            return {key: _plain(item) for key, item in value.items()}
        case float() if not math.isfinite(value):
            return None
    return value


def client_folder(client: str) -> str:
    """Valid folder name for a client's id, which may have any characters."""
    return quote(client, safe=" ").replace(".", "%2E")
