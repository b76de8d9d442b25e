"""Files of rounds other than the checkpoint: the clients' states and the base updates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.adapter import Adapter
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo
from fedlora.rounds import durable
from fedlora.rounds.codec import encode_state
from fedlora.runs.client_folder import client_folder
from fedlora.runs.damage import missing, read_state


@dataclass(frozen=True)
class Listing:
    """The required files: each client's last complete round that saved a state, and the rounds with base updates."""

    states: Mapping[str, int] = field(default_factory=dict)
    base_updates: Sequence[int] = ()


_NOTHING = Listing()


class RoundFiles:
    """Files clients/ID/ROUND.safetensors and base_updates/ROUND.safetensors of a folder.

    Files of rounds after the last complete one exist, but are not listed; those rounds write them again.
    """

    def __init__(self, path: Path, listing: Listing = _NOTHING) -> None:
        self._path = path
        self._listing = listing
        self._new: list[tuple[int, str | None]] = []  # states (round, client) and base updates (round, None), not listed

    def listing(self, rounds_done: int) -> Listing:
        """Files needed after this number of complete rounds."""
        states, base_updates = dict(self._listing.states), list(self._listing.base_updates)
        for index, client in sorted((new for new in self._new if new[0] < rounds_done), key=lambda new: new[0]):
            if client is not None:
                states[client] = index
            elif index not in base_updates:
                base_updates.append(index)
        return Listing(states, base_updates)

    def commit(self, rounds_done: int) -> None:
        """Lists the files written by the rounds that are complete now."""
        self._listing = self.listing(rounds_done)
        self._new = [new for new in self._new if new[0] >= rounds_done]

    def restore(self, listing: Listing) -> None:
        """Sets the listing to that of a checkpoint, and reads all of its files.

        Raises:
            UserError: a file is missing or damaged.
        """
        self._listing, self._new = listing, []
        for client, index in listing.states.items():
            read_state(self._client_file(client, index))
        for index in listing.base_updates:
            read_state(self._base_update_file(index))

    def client_state(self, client: ClientInfo, before: int) -> Any | None:
        """Client's state saved in the last round with index below `before`; None if no round saved one.

        Raises:
            UserError: the state is damaged, or missing although listed.
        """
        found = [index for index in self._saved(client.id) if index < before]
        listed = self._listing.states.get(client.id, before)
        if listed < before and listed not in found:
            raise missing(self._client_file(client.id, listed))
        return read_state(self._client_file(client.id, max(found)))[0] if found else None

    def save_client(self, client: ClientInfo, index: int, state: Any) -> None:
        """Writes the client's state after the round with this index; retains the two previous states.

        The previous round may not be complete yet, and never completes if its server dies (see `loop.run_rounds`).

        Raises:
            RunStopped: the disk is full.
        """
        file = self._client_file(client.id, index)
        durable.folder(file.parent)
        durable.replace(file, encode_state(state))
        self._new.append((index, client.id))
        earlier = sorted(i for i in self._saved(client.id) if i < index)
        for old in earlier[:-2]:
            self._client_file(client.id, old).unlink()

    def save_base_update(self, index: int, base_update: Adapter) -> None:
        """Writes the base update of the round with this index.

        Raises:
            RunStopped: the disk is full.
        """
        file = self._base_update_file(index)
        durable.folder(file.parent)
        durable.replace(file, encode_state(base_update))
        self._new.append((index, None))

    def base_update(self, index: int) -> Mapping[str, LowRank]:
        """Base update of the round with this index."""
        found: Mapping[str, LowRank] = read_state(self._base_update_file(index))[0]
        return found

    def base_updates(self) -> list[int]:
        """Indices of the rounds with a base update, in order, including rounds after the last complete one."""
        return sorted(int(file.stem) for file in (self._path / "base_updates").glob("*.safetensors"))

    def forget(self, done: int) -> None:
        """Removes the files of all rounds after the first `done`."""
        for file in [*self._path.glob("base_updates/*.safetensors"), *self._path.glob("clients/*/*.safetensors")]:
            if int(file.stem) >= done:
                file.unlink()

    def _base_update_file(self, index: int) -> Path:
        return self._path / "base_updates" / f"{index}.safetensors"

    def _client_file(self, client: str, index: int) -> Path:
        return self._path / "clients" / client_folder(client) / f"{index}.safetensors"

    def _saved(self, client: str) -> list[int]:
        return [int(file.stem) for file in self._client_file(client, 0).parent.glob("*.safetensors")]
