"""The state of a run after its last complete round, read without the run's lock."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.adapter import Adapter
from fedlora.errors import UserError
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo
from fedlora.rounds.codec import decode_note
from fedlora.rounds.plan import RunState
from fedlora.runs.damage import read_state
from fedlora.runs.folder import BEST, CHECKPOINT, ROWS
from fedlora.runs.round_files import Listing, RoundFiles
from fedlora.runs.row_log import RowLog


@dataclass(frozen=True)
class SavedState:
    """The server's state after `done` rounds, its base updates, and the saved state of one client, if any.

    `best` has the adapters of the best round, for a run that stores them.
    """

    done: int
    server: RunState
    base_updates: list[Mapping[str, LowRank]]
    client_state: Any | None
    best: Mapping[str, Adapter] | None

    @classmethod
    def read(cls, path: Path, client: ClientInfo | None) -> "SavedState":
        """Reads the state of the run in this directory, which another process may be continuing.

        Raises:
            UserError: a file is missing or damaged.
        """
        while True:
            server, notes = read_state(path / CHECKPOINT)
            try:
                return cls._of(path, server, notes, client)
            except UserError:
                if decode_note(str(path / CHECKPOINT)) == notes:  # else a round has ended, which removed older files
                    raise

    @classmethod
    def _of(cls, path: Path, server: RunState, notes: Mapping[str, Any], client: ClientInfo | None) -> "SavedState":
        done, files = notes["rounds_done"], RoundFiles(path, Listing(notes["states"], notes["base_updates"]))
        rows = RowLog.read(path / ROWS, *notes["rows"]).rows()
        best = None
        if rows and rows[-1].best_round is not None:
            best = read_state(path / BEST / f"{rows[-1].best_round}.safetensors")[0]
        base_updates = [files.base_update(index) for index in server.base_updates.rounds]
        return cls(done, server, base_updates, None if client is None else files.client_state(client, done), best)
