"""Run directory: crash-safe storage with exclusive access."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedlora.adapter import Adapter
from fedlora.errors import UserError
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo
from fedlora.rounds import durable
from fedlora.rounds.codec import encode_state
from fedlora.rounds.row import RoundRow
from fedlora.runs.damage import damaged, missing, read_state, require_digest
from fedlora.runs.lock import LOCK, FolderLock
from fedlora.runs.manifest_file import MANIFEST, encode_manifest, read_manifest
from fedlora.runs.round_files import Listing, RoundFiles
from fedlora.runs.row_log import RowLog

DEPLOY = "deploy"
"""Subfolder of a run's folder for files of a deployment."""
ADAPTER = "adapter"
"""Subfolder of a run's folder for its exported adapters."""
CHECKPOINT = "checkpoint.safetensors"
ROWS = "rounds.jsonl"
BEST = "best"
"""Subfolder of a run's folder for the adapters of the best round."""
SAMPLES = "samples"
"""Subfolder of a run's folder for generated answers."""


class RunFolder:
    """Folder of one run, locked for this process.

    experiment.toml      all settings
    model/               the model, if a Python program passed it
    environment.json     versions, and values that determine how clients are trained
    manifest.json        inputs of the run; exists once the run has begun
    rounds.jsonl         one row for each complete round, and for the model before training
    checkpoint.safetensors   the server's state after the last complete round; replacing it commits the round
    samples/round-N.jsonl   generated answers to test examples, if any, for a person to read
    clients/ID/ROUND.safetensors   states of stateful clients
    base_updates/ROUND.safetensors   base updates, for methods that produce them
    best/ROUND.safetensors   adapters of the best round, for runs that may stop early

    Rows, client states, base updates and adapters are written before the commit; after a crash those of later rounds are
    written again. Each state, base update, adapter and the manifest has a checksum. The checkpoint lists the required
    files, and the length and checksum of the rows, so that `restore` detects missing or damaged files.
    """

    def __init__(self, path: Path, seconds: float = 0.0) -> None:
        """Locks the folder, which must exist; waits up to `seconds` for another process to release it.

        Raises:
            UserError: it does not exist, cannot be written, or is locked by another process.
        """
        self.path = path
        self.experiment = path / "experiment.toml"
        self._checkpoint = path / CHECKPOINT
        self._best = path / BEST
        self._lock = FolderLock(path, seconds)
        self._run = ""  # the id in the manifest
        self._rows = RowLog(path / ROWS)
        self._files = RoundFiles(path)

    @classmethod
    def create(cls, path: Path, seconds: float = 0.0) -> "RunFolder":
        """Creates and locks a new folder; waits up to `seconds` for another process to release it.

        Raises:
            UserError: it has been used before, or cannot be created.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path}: cannot be created: {error.strerror}; choose another directory with --out") from error
        _require_unused(path)
        folder = cls(path, seconds)
        try:
            _require_unused(path)  # another process may have used it meanwhile
        except UserError:
            folder.release()
            raise
        return folder

    def release(self) -> None:
        """Releases the lock; removes the folder if it contains nothing else."""
        self._lock.release()

    def require(self) -> None:
        """Checks that the folder still exists at its path, so that it is not created again with only a part of the run.

        Raises:
            RunStopped: it was moved or removed.
        """
        self._lock.require()

    def record(self, name: str, content: str) -> None:
        """Writes one of the small text files.

        Raises:
            RunStopped: the disk is full, or the folder no longer exists.
        """
        self.require()
        durable.replace(self.path / name, content.encode())

    def save_samples(self, rounds: int, content: str) -> None:
        """Writes generated answers after this number of rounds to a file that only its user can read.

        Raises:
            RunStopped: it cannot be written.
        """
        self.require()
        path = self.path / SAMPLES / f"round-{rounds}.jsonl"
        durable.folder(path.parent)
        durable.replace(path, content.encode(), mode=0o600)

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
        self.record(MANIFEST, encode_manifest(manifest))

    def commit(self, rounds_done: int, server: Any, row: RoundRow | None = None) -> None:
        """Commits a round, or with 0 rounds the state before the first; `row` is absent at the beginning of a run.

        Raises:
            RunStopped: the disk is full; the previous round stays complete.
        """
        self.require()
        rows = self._rows.append(row)
        notes = {
            "rounds_done": rounds_done,
            "run": self._run,
            "rows": [rows.length, rows.sha256.hexdigest()],
            **asdict(self._files.listing(rounds_done)),
        }
        durable.replace(self._checkpoint, encode_state(server, **notes))
        self._rows = rows
        self._files.commit(rounds_done)
        if row is not None:
            for file in self._best.glob("*.safetensors"):
                if file != self._best_file(row.best_round):
                    file.unlink()

    def restore(self) -> tuple[int, Any]:
        """Number of complete rounds, and the server's state after them (None before `begin`); truncates later rows.

        Reads and checks all files that the run needs to resume.

        Raises:
            UserError: a file is missing or damaged.
        """
        manifest = read_manifest(self.path)
        self._run = "" if manifest is None else manifest["id"]
        if not self._checkpoint.exists():
            if manifest is not None or (self._rows.path.exists() and self._rows.path.stat().st_size):
                raise missing(self._checkpoint)
            return 0, None
        server, notes = read_state(self._checkpoint)
        if notes["run"] != self._run:
            if manifest is None and notes["rounds_done"]:
                raise missing(self.path / MANIFEST)
            if manifest is not None:
                raise damaged(f"{self._checkpoint} belongs to another run than {self.path / MANIFEST}")
        if manifest is not None:
            require_digest(self.path / "environment.json", manifest["environment"])
        self._files.restore(Listing(notes["states"], notes["base_updates"]))
        self._rows = RowLog.restore(self._rows.path, *notes["rows"])
        self.best()
        return notes["rounds_done"], server

    def rows(self) -> list[RoundRow]:
        """Rows of the complete rounds, after `restore` or `commit`.

        Raises:
            UserError: they were changed since.
        """
        return self._rows.rows()

    def client_state(self, client: ClientInfo, before: int) -> Any | None:
        """As `RoundFiles.client_state`."""
        return self._files.client_state(client, before)

    def save_client(self, client: ClientInfo, index: int, state: Any) -> None:
        """As `RoundFiles.save_client`; also RunStopped if the folder no longer exists."""
        self.require()
        self._files.save_client(client, index, state)

    def save_base_update(self, index: int, base_update: Adapter) -> None:
        """As `RoundFiles.save_base_update`; also RunStopped if the folder no longer exists."""
        self.require()
        self._files.save_base_update(index, base_update)

    def save_best(self, number: int, adapters: Mapping[str, Adapter]) -> None:
        """Writes the adapters after the round with this number, which counts from 1, before it is committed as the best.

        Raises:
            RunStopped: the disk is full, or the folder no longer exists.
        """
        self.require()
        durable.folder(self._best)
        durable.replace(self._best_file(number), encode_state(adapters))

    def best(self) -> Mapping[str, Adapter] | None:
        """The adapters of the best complete round; None if the run has none.

        Raises:
            UserError: they are missing or damaged.
        """
        rows = self.rows()
        if not rows or rows[-1].best_round is None:
            return None
        found: Mapping[str, Adapter] = read_state(self._best_file(rows[-1].best_round))[0]
        return found

    def base_update(self, index: int) -> Mapping[str, LowRank]:
        """Base update of the round with this index."""
        return self._files.base_update(index)

    def base_updates(self) -> list[int]:
        """Indices of the rounds with a base update, in order, including rounds after the last complete one."""
        return self._files.base_updates()

    def forget(self, done: int) -> None:
        """Removes the base updates and the clients' states of all rounds after the first `done`."""
        self._files.forget(done)

    def _best_file(self, number: int | None) -> Path:
        return self._best / f"{number}.safetensors"


def _require_unused(path: Path) -> None:
    if any(entry.name != LOCK and entry.suffix != ".partial" for entry in path.iterdir()):
        raise UserError(f"{path}: is not empty; resume with --resume {path}, or choose another directory with --out")
