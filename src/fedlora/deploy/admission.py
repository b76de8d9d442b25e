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
        self, reply: HandshakeReply, credential: Credential | None, taken: Mapping[str, str]
    ) -> str | None:
        """Reason for rejecting this node, None if it is accepted; `taken` maps the clients of other nodes to their nodes.

        `credential` is None on a server without keys, where a node may register any client that no other node has.
        """
        if (reply.protocol, reply.version) != (PROTOCOL, __version__):
            return f"has fedlora {reply.version}, the server {__version__}; install the same version on both"
        if reply.base != self.base:
            return f"has another base model ({reply.base[:12]}, the server {self.base[:12]})"
        ids = [client.id for client in reply.clients]
        if len(set(ids)) != len(ids):
            return "has two clients with the same name"
        return next(
            (reason for client in reply.clients if (reason := self._client_rejection(client, credential, taken))), None
        )

    def _client_rejection(
        self, client: ClientRecord, credential: Credential | None, taken: Mapping[str, str]
    ) -> str | None:
        if credential is not None and client.id not in credential.clients:
            return f"its key {credential.name!r} is not for client {client.id!r} (fedlora keys --node --client)"
        if client.id in taken:
            return f"client {client.id!r} is already registered by another node ({taken[client.id]})"
        if client.rank > self.rank or (client.rank != self.rank and not self.mixed_ranks):
            allowed = f"at most {self.rank}" if self.mixed_ranks else f"{self.rank}"
            return f"client {client.id!r} has rank {client.rank}, the method expects {allowed}"
        return None
