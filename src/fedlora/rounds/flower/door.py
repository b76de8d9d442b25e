"""Which nodes are let in."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedlora.rounds.flower.wire import PROTOCOL, Person, Present
from fedlora.version import __version__


@dataclass(frozen=True)
class Door:
    """Lets in the nodes of this version and this base model whose clients fit the run.

    `clients` are the only ones that may come; None: any.
    """

    base: str
    rank: int
    mixed_ranks: bool
    clients: frozenset[str] | None = None

    def refusal(self, present: Present, taken: Mapping[str, str]) -> str | None:
        """Why this node is not let in, None if it is; `taken` are the clients of the other nodes, and their nodes."""
        if (present.protocol, present.version) != (PROTOCOL, __version__):
            return f"has fedlora {present.version}, the server {__version__}; install the same version on both"
        if present.base != self.base:
            return f"has another base model ({present.base[:12]}, the server {self.base[:12]})"
        ids = [person.id for person in present.clients]
        if len(set(ids)) != len(ids):
            return "has two clients of one name"
        return next((reason for person in present.clients if (reason := self._unfit(person, taken))), None)

    def _unfit(self, person: Person, taken: Mapping[str, str]) -> str | None:
        if person.id in taken:
            return f"client {person.id!r} is already there, on another node ({taken[person.id]})"
        if self.clients is not None and person.id not in self.clients:
            return f"client {person.id!r} is not one of this run's"
        if person.rank > self.rank or (person.rank != self.rank and not self.mixed_ranks):
            allowed = f"at most {self.rank}" if self.mixed_ranks else f"{self.rank}"
            return f"client {person.id!r} has rank {person.rank}, the method takes {allowed}"
        return None
