"""Backend for clients on other nodes: registration, task requests, acceptance of results. Independent of the transport."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from fedlora.adapter import Tensors
from fedlora.deploy.admission import NodeAdmission
from fedlora.deploy.credential import Credential
from fedlora.deploy.scores import ScoreCheck
from fedlora.deploy.wire import (
    ClientRecord,
    ClientResult,
    ClientTask,
    Done,
    Handshake,
    HandshakeReply,
    Notice,
    Refused,
    RoundRecord,
    TaskRequest,
    decode_message,
    encode_message,
)
from fedlora.errors import RunStopped
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Reply, Round, Score
from fedlora.rounds.base_updates import base_update_indices
from fedlora.rounds.client import Trainer
from fedlora.rounds.codec import decode, encode
from fedlora.rounds.validator import Failed

_HELLO_SECONDS = 600.0
"""A node loads its model before it replies to the handshake."""
_NOTICE_SECONDS = 10.0
_UNDECLARED = 10_000
"""Maximum number of clients per node on a server without keys, which is reachable from its own machine only."""


@runtime_checkable
class Transport(Protocol):
    """Carries messages to nodes and back."""

    def nodes(self) -> Collection[int]:
        """Nodes that are currently connected."""

    def credential(self, node: int) -> Credential | None:
        """Key with which a connected node was authenticated; None if the server has no keys."""

    def send(self, messages: Mapping[int, bytes], seconds: float) -> dict[str, int]:
        """Sends each node its message, which expires after `seconds`; returns message ids and the node of each.

        A node reads its messages in the order in which they were sent.
        """

    def collect(self, message_ids: Collection[str]) -> Mapping[str, bytes | str]:
        """Replies received so far, by message id; a string is the reason why a reply will not arrive."""


Kind = Literal["train", "evaluate", "keep"]
_Found = tuple[Round, ClientResult, "bytes | None"]
"""Round stated in a node's reply, the result of one client, and that client's upload."""


@dataclass
class _Node:
    """An accepted node. `at` is its Flower node id, which changes when it reconnects.

    `base_updates` are those that the node reported to hold, `in_flight` those in messages that it has not answered yet.
    Its messages may refer to at most `most` clients.
    """

    at: int
    clients: list[ClientInfo]
    base_updates: list[int]
    most: int
    in_flight: set[int] = field(default_factory=set)

    def expected(self) -> list[int]:
        """Base updates that the node holds once it has read, in order, all messages sent to it."""
        return sorted({*self.base_updates, *self.in_flight})


class FlowerBackend:
    """Backend over a transport. Nodes that connect late or reconnect are accepted between two rounds."""

    def __init__(
        self,
        transport: Transport,
        handshake: Handshake,
        admission: NodeAdmission,
        trainer: Trainer,
        scores: ScoreCheck,
        deadline: float,
        poll: float = 0.5,
        notify: Callable[[str], None] = print,
        tensors: int = 2**16,
    ) -> None:
        """`handshake` describes the run; `notify` receives one line for each rejected node and each failed client.

        `tensors` is the maximum number of tensors in an upload.
        """
        self._transport, self._handshake, self._admission, self._trainer, self._score_check = (
            transport,
            handshake,
            admission,
            trainer,
            scores,
        )
        self._deadline, self._poll, self._notify, self._tensors = deadline, poll, notify, tensors
        self._nodes: dict[str, _Node] = {}  # by the name of the node's key, without keys by the node's own name
        self._greeted: set[int] = set()
        self._pending: dict[str, int] = {}  # handshakes: message id -> Flower node id
        self._refused: list[str] = []

    def gather(self, count: int, seconds: float) -> None:
        """Waits until `count` clients have connected.

        Raises:
            RunStopped: fewer connected within `seconds`; names the connected clients and the rejected nodes.
        """
        until = time.monotonic() + seconds
        while len(self.clients()) < count:
            if time.monotonic() > until:
                came = ", ".join(sorted(client.id for client in self.clients())) or "none"
                why = "".join(f"; {reason}" for reason in self._refused)
                raise RunStopped(f"of {count} clients, {came} came within {seconds:g} s (deploy.wait){why}")
            time.sleep(self._poll)

    def clients(self) -> Sequence[ClientInfo]:
        """All accepted clients, including those whose node is disconnected."""
        self._register()
        return sorted((client for node in self._nodes.values() for client in node.clients), key=lambda client: client.id)

    def held(self) -> Mapping[str, Sequence[int]]:
        """Base updates reported by the clients' nodes, and those in flight to them."""
        return {client.id: node.expected() for node in self._nodes.values() for client in node.clients}

    def merge_into_base(self, change: Mapping[str, LowRank]) -> None:
        """Changes the server's own base, which the global evaluation uses."""
        self._trainer.merge_into_base(change)

    def train_clients(
        self, rnd: Round, sent: Mapping[ClientInfo, Tensors], pending: Mapping[ClientInfo, Tensors]
    ) -> Iterator[Reply | Failed]:
        """Replies in the order of `sent`; a client without a result at the deadline has failed. Sends immediately."""
        return self._replies(self._sent("train", rnd, sent, pending))

    def keep(self, rnd: Round, sent: Mapping[ClientInfo, Tensors], pending: Mapping[ClientInfo, Tensors]) -> None:
        """Has clients write the adapter for round `rnd` to their nodes' folders; notifies which clients did."""
        failed = {client.id: found for client, found in self._sent("keep", rnd, sent, pending) if isinstance(found, str)}
        for client, reason in failed.items():
            self._notify(f"client {client} could not keep its adapter: {reason}")
        self._notify(
            f"{len(sent) - len(failed)} of {len(sent)} clients have their adapter in their node's folder, in runs/*/adapter"
        )

    def finish(self) -> None:
        """Notifies the connected nodes that the run is finished; waits only briefly for their replies."""
        connected = set(self._transport.nodes())
        notice = encode_message(Notice(run=self._handshake.run, state="finished", text="all rounds are complete"))
        messages = {node.at: notice for node in self._nodes.values() if node.at in connected}
        message_ids = self._transport.send(messages, _NOTICE_SECONDS) if messages else {}
        until = time.monotonic() + _NOTICE_SECONDS
        while message_ids and time.monotonic() < until:
            received = self._transport.collect(list(message_ids))
            if message_ids := {ticket: at for ticket, at in message_ids.items() if ticket not in received}:
                time.sleep(self._poll)

    def _replies(self, results: Iterator[tuple[ClientInfo, _Found | str]]) -> Iterator[Reply | Failed]:
        for client, found in results:
            if isinstance(found, str):
                yield Failed(client, found)
                continue
            round_record, result, upload = found
            try:
                if upload is None:
                    raise ValueError("sent no upload")
                yield Reply(client, round_record, decode(upload, self._tensors), result.weight, result.notes)
            except ValueError as error:
                yield Failed(client, str(error))

    def evaluate(
        self, rnd: Round, sent: Mapping[ClientInfo, Tensors], pending: Mapping[ClientInfo, Tensors]
    ) -> Iterator[tuple[ClientInfo, Score | None]]:
        """Valid scores that arrived by the deadline. Sends immediately."""
        return self._scores(rnd, self._sent("evaluate", rnd, sent, pending))

    def _scores(
        self, rnd: Round, results: Iterator[tuple[ClientInfo, _Found | str]]
    ) -> Iterator[tuple[ClientInfo, Score | None]]:
        for client, found in results:
            if isinstance(found, str):
                self._notify(f"client {client.id} did not evaluate: {found}")
                continue
            round_record, result, _ = found
            reason = "is for another round" if round_record != rnd else self._score_check.rejection(result, client)
            if reason is not None:
                self._notify(f"client {client.id}: its score is rejected: {reason}")
            else:
                yield client, Score(result.examples, result.metrics) if result.examples else None

    def _sent(
        self,
        kind: Kind,
        rnd: Round,
        sent: Mapping[ClientInfo, Tensors],
        pending: Mapping[ClientInfo, Tensors],
    ) -> Iterator[tuple[ClientInfo, _Found | str]]:
        """Sends the task requests; yields each client's result, or the reason for its absence, in the order of `sent`."""
        found: dict[str, _Found | str] = {}
        messages: dict[int, bytes] = {}
        names: dict[int, str] = {}
        connected = set(self._transport.nodes())
        for name, node in self._nodes.items():
            state = {client: download for client, download in sent.items() if client in node.clients}
            if state and node.at in connected:
                names[node.at] = name
                messages[node.at] = self._request(kind, rnd, node, state, pending)
            elif state:
                found |= {client.id: "its node is not connected" for client in state}
        message_ids = self._transport.send(messages, self._deadline) if messages else {}
        for at in messages.keys() - set(message_ids.values()):
            found |= {client.id: "could not be sent to its node" for client in self._nodes[names[at]].clients}
        return self._results(list(sent), message_ids, names, found, time.monotonic() + self._deadline)

    def _results(
        self,
        clients: Sequence[ClientInfo],
        message_ids: dict[str, int],
        names: Mapping[int, str],
        found: dict[str, _Found | str],
        until: float,
    ) -> Iterator[tuple[ClientInfo, _Found | str]]:
        for client in clients:
            while client.id not in found:
                if not self._collect(message_ids, names, found):
                    if time.monotonic() > until:
                        found[client.id] = f"gave no answer within {self._deadline:g} s (deploy.deadline)"
                    else:
                        time.sleep(self._poll)
            yield client, found.pop(client.id)
        for name in names.values():
            self._nodes[name].in_flight.clear()  # base updates not reported by now did not arrive

    def _collect(self, message_ids: dict[str, int], names: Mapping[int, str], found: dict[str, _Found | str]) -> bool:
        """Collects new replies; whether there were any. A client's result counts once, and only from its own node."""
        messages = self._transport.collect(list(message_ids)) if message_ids else {}
        for ticket, letter in messages.items():
            node = self._nodes[names[message_ids.pop(ticket)]]
            state = {client.id for client in node.clients}
            results = _opened(letter, node.most)
            if isinstance(results, str):
                found |= dict.fromkeys(state, results)
                continue
            done, payloads = results
            node.base_updates = done.base_updates
            found |= dict.fromkeys(state, "its node's answer does not mention it")
            for result in done.results:
                if result.id in state:
                    found[result.id] = _found(done, result, payloads)
        return bool(messages)

    def _request(
        self,
        kind: Kind,
        rnd: Round,
        node: _Node,
        sent: Mapping[ClientInfo, Tensors],
        pending: Mapping[ClientInfo, Tensors],
    ) -> bytes:
        """Encodes the message to one node; a payload shared by several of its clients is included once."""
        payloads: dict[bytes, int] = {}
        tasks = [
            ClientTask(
                client=ClientRecord.of(client),
                download=payloads.setdefault(encode(download), len(payloads)),
                base_updates=payloads.setdefault(encode(pending[client]), len(payloads)) if client in pending else None,
            )
            for client, download in sent.items()
        ]
        request = TaskRequest(
            kind=kind, run=self._handshake.run, round_record=RoundRecord.of(rnd), held=node.expected(), tasks=tasks
        )
        node.in_flight |= {index for client in sent if client in pending for index in base_update_indices(pending[client])}
        return encode_message(request, list(payloads))

    def _register(self) -> None:
        """Sends the handshake to new nodes, and registers those whose reply is accepted."""
        connected = set(self._transport.nodes())
        new = connected - self._greeted
        self._greeted = (self._greeted & connected) | new
        if new:
            self._pending |= self._transport.send(dict.fromkeys(new, encode_message(self._handshake)), _HELLO_SECONDS)
        messages = self._transport.collect(list(self._pending)) if self._pending else {}
        for ticket, letter in messages.items():
            at = self._pending.pop(ticket)
            reason = self._welcome(at, letter, connected)
            if isinstance(letter, str):
                self._greeted.discard(at)  # possibly still loading its model: handshake again
            elif reason is not None and at in connected:  # its reply is not awaited
                notice = Notice(run=self._handshake.run, state="rejected", text=reason[:1000])
                self._transport.send({at: encode_message(notice)}, _NOTICE_SECONDS)
            if reason is not None and f"node {at} refused: {reason}" not in self._refused:
                self._refused.append(f"node {at} refused: {reason}")
                self._notify(self._refused[-1])

    def _welcome(self, at: int, letter: bytes | str, connected: Collection[int]) -> str | None:
        """Registers a node, replacing its earlier entry; returns the reason if it is rejected."""
        if isinstance(letter, str):
            return letter
        credential = self._transport.credential(at)
        most = _UNDECLARED if credential is None else len(credential.clients)
        try:
            header, _ = decode_message(letter, most)
        except ValueError as error:
            return str(error)
        if isinstance(header, Refused):
            return str(header.failure)
        if not isinstance(header, HandshakeReply):
            return f"answers {header.kind!r} to a hello"
        name = header.node if credential is None else credential.name
        others = {other: node for other, node in self._nodes.items() if other != name and node.at in connected}
        taken = {client.id: other for other, node in others.items() for client in node.clients}
        reason = self._admission.rejection_reason(header, credential, taken)
        if reason is None:
            claimed = {person.id for person in header.clients}
            for node in self._nodes.values():  # of disconnected nodes
                node.clients = [client for client in node.clients if client.id not in claimed]
            clients = [person.info() for person in header.clients]
            self._nodes[name] = _Node(at, clients, list(header.base_updates), len(clients))
        return reason


def _opened(letter: bytes | str, clients: int) -> tuple[Done, list[bytes]] | str:
    """Decodes a node's reply to a task request for at most `clients` clients; a string is the reason if it is invalid."""
    if isinstance(letter, str):
        return letter
    try:
        header, payloads = decode_message(letter, clients)
    except ValueError as error:
        return f"its node sent {error}"
    if isinstance(header, Refused):
        return str(header.failure)
    return (header, payloads) if isinstance(header, Done) else f"its node answers {header.kind!r}"


def _found(done: Done, result: ClientResult, payloads: Sequence[bytes]) -> _Found | str:
    if result.failure is not None:
        return str(result.failure)
    if result.upload is None:
        return done.round_record.round(), result, None
    if result.upload >= len(payloads):
        return "its upload is missing"
    return done.round_record.round(), result, payloads[result.upload]
