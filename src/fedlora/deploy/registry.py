"""Registration of nodes: the handshake with each connected node, and the clients of those that are accepted."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from fedlora.deploy.admission import NodeAdmission
from fedlora.deploy.transport import Transport
from fedlora.deploy.wire import Handshake, HandshakeReply, Notice, Rejected, decode_message, encode_message
from fedlora.errors import RunStopped
from fedlora.messages import ClientInfo

_HANDSHAKE_SECONDS = 600.0
"""A node loads its model before it replies to the handshake."""
_NOTICE_SECONDS = 10.0
_MAX_CLIENTS_WITHOUT_KEY = 10_000
"""Maximum number of clients per node on a server without keys, which is reachable from its own machine only."""


@dataclass
class RegisteredNode:
    """An accepted node. Its `flower_id` changes when it reconnects.

    `base_updates` are those that the node has reported, `in_flight` those in messages to which it has not replied yet.
    Its messages may refer to at most `max_clients` clients.
    """

    flower_id: int
    clients: list[ClientInfo]
    base_updates: list[int]
    max_clients: int
    in_flight: set[int] = field(default_factory=set)

    def expected_base_updates(self) -> list[int]:
        """Base updates that the node has after it has read all messages sent to it, in order."""
        return sorted({*self.base_updates, *self.in_flight})


class NodeRegistry:
    """Nodes accepted so far, including those that are disconnected now."""

    def __init__(
        self,
        transport: Transport,
        handshake: Handshake,
        admission: NodeAdmission,
        notify: Callable[[str], None],
        poll: float,
    ) -> None:
        """`notify` receives one line for each rejected node; `poll` is the polling interval in seconds."""
        self.nodes: dict[str, RegisteredNode] = {}
        """Accepted nodes by the name of their key; without keys, by the node's own name."""
        self._transport, self._handshake, self._admission = transport, handshake, admission
        self._notify, self._poll = notify, poll
        self._contacted: set[int] = set()  # Flower node ids
        self._pending: dict[str, int] = {}  # handshakes: message id -> Flower node id
        self._rejections: list[str] = []

    def clients(self) -> Sequence[ClientInfo]:
        """All accepted clients, including those whose node is disconnected; registers new nodes first."""
        self._update()
        return sorted((client for node in self.nodes.values() for client in node.clients), key=lambda client: client.id)

    def wait_for_clients(self, count: int, seconds: float) -> None:
        """Waits until `count` clients have connected.

        Raises:
            RunStopped: fewer connected within `seconds`; names the connected clients and the rejected nodes.
        """
        until = time.monotonic() + seconds
        while len(self.clients()) < count:
            if time.monotonic() > until:
                connected = ", ".join(client.id for client in self.clients()) or "none"
                rejections = "".join(f"; {reason}" for reason in self._rejections)
                raise RunStopped(
                    f"expected {count} clients within {seconds:g} s (deploy.wait), connected: {connected}{rejections}"
                )
            time.sleep(self._poll)

    def send_finished(self) -> None:
        """Notifies the connected nodes that the run is finished; waits only briefly for their replies."""
        connected = set(self._transport.nodes())
        notice = encode_message(Notice(run=self._handshake.run, state="finished", text="all rounds are complete"))
        messages = {node.flower_id: notice for node in self.nodes.values() if node.flower_id in connected}
        pending = set(self._transport.send(messages, _NOTICE_SECONDS)) if messages else set()
        until = time.monotonic() + _NOTICE_SECONDS
        while pending and time.monotonic() < until:
            if pending := pending - self._transport.collect(list(pending)).keys():
                time.sleep(self._poll)

    def _update(self) -> None:
        """Sends the handshake to new nodes, and registers those whose reply is accepted."""
        connected = set(self._transport.nodes())
        new = connected - self._contacted
        self._contacted = (self._contacted & connected) | new
        if new:
            handshake = encode_message(self._handshake)
            self._pending |= self._transport.send(dict.fromkeys(new, handshake), _HANDSHAKE_SECONDS)
        replies = self._transport.collect(list(self._pending)) if self._pending else {}
        for message_id, reply in replies.items():
            flower_id = self._pending.pop(message_id)
            reason = self._register(flower_id, reply, connected)
            if isinstance(reply, str):
                self._contacted.discard(flower_id)  # possibly still loading its model: handshake again
            elif reason is not None and flower_id in connected:  # its reply is not awaited
                notice = Notice(run=self._handshake.run, state="rejected", text=reason[:1000])
                self._transport.send({flower_id: encode_message(notice)}, _NOTICE_SECONDS)
            if reason is not None and (line := f"node {flower_id} rejected: {reason}") not in self._rejections:
                self._rejections.append(line)
                self._notify(line)

    def _register(self, flower_id: int, reply: bytes | str, connected: Collection[int]) -> str | None:
        """Registers a node, replacing its earlier entry; returns the reason if it is rejected."""
        if isinstance(reply, str):
            return reply
        credential = self._transport.credential(flower_id)
        max_clients = _MAX_CLIENTS_WITHOUT_KEY if credential is None else len(credential.clients)
        try:
            header, _ = decode_message(reply, max_clients)
        except ValueError as error:
            return str(error)
        if isinstance(header, Rejected):
            return str(header.failure)
        if not isinstance(header, HandshakeReply):
            return f"replied to the handshake with {header.kind!r}"
        name = header.node if credential is None else credential.name
        taken = self._clients_of_other_nodes(name, connected)
        reason = self._admission.rejection_reason(header, credential, taken)
        if reason is None:
            claimed = {client.id for client in header.clients}
            for node in self.nodes.values():  # of disconnected nodes
                node.clients = [client for client in node.clients if client.id not in claimed]
            clients = [client.info() for client in header.clients]
            self.nodes[name] = RegisteredNode(flower_id, clients, list(header.base_updates), len(clients))
        return reason

    def _clients_of_other_nodes(self, name: str, connected: Collection[int]) -> Mapping[str, str]:
        """Maps the clients of connected nodes other than `name` to their nodes."""
        others = {other: node for other, node in self.nodes.items() if other != name and node.flower_id in connected}
        return {client.id: other for other, node in others.items() for client in node.clients}
