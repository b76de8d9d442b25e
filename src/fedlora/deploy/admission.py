"""Admission of nodes to a run."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedlora.deploy.credential import Credential
from fedlora.deploy.wire import PROTOCOL, ClientRecord, HandshakeReply
from fedlora.version import __version__


@dataclass(frozen=True)
class NodeAdmission:
    """Accepts nodes that have this version and this base model, and whose clients fit the run."""

    base: str
    rank: int
    mixed_ranks: bool

    def rejection_reason(
        self, present: HandshakeReply, credential: Credential | None, taken: Mapping[str, str]
    ) -> str | None:
        """Reason for rejecting this node, None if it is accepted; `taken` maps the clients of other nodes to their nodes.

        `credential` is None on a server without keys, where a node may register any client that no other node has.
        """
        if (present.protocol, present.version) != (PROTOCOL, __version__):
            return f"has fedlora {present.version}, the server {__version__}; install the same version on both"
        if present.base != self.base:
            return f"has another base model ({present.base[:12]}, the server {self.base[:12]})"
        ids = [person.id for person in present.clients]
        if len(set(ids)) != len(ids):
            return "has two clients of one name"
        return next((reason for person in present.clients if (reason := self._unfit(person, credential, taken))), None)

    def _unfit(self, person: ClientRecord, credential: Credential | None, taken: Mapping[str, str]) -> str | None:
        if credential is not None and person.id not in credential.clients:
            return f"its key {credential.name!r} was not made for client {person.id!r} (fedlora keys --node --client)"
        if person.id in taken:
            return f"client {person.id!r} is already there, on another node ({taken[person.id]})"
        if person.rank > self.rank or (person.rank != self.rank and not self.mixed_ranks):
            allowed = f"at most {self.rank}" if self.mixed_ranks else f"{self.rank}"
            return f"client {person.id!r} has rank {person.rank}, the method takes {allowed}"
        return None
