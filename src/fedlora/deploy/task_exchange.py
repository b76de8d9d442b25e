"""Exchange of task requests and results with registered nodes. A failed or late node affects its own clients only."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedlora.adapter import Tensors
from fedlora.deploy.registry import NodeRegistry, RegisteredNode
from fedlora.deploy.transport import Transport
from fedlora.deploy.wire import (
    AcknowledgedRecord,
    ClientRecord,
    ClientResult,
    ClientTask,
    Done,
    Kind,
    Rejected,
    RoundRecord,
    TaskRequest,
    decode_message,
    encode_message,
)
from fedlora.messages import ClientInfo, Round
from fedlora.rounds.base_updates import base_update_indices
from fedlora.rounds.codec import encode


@dataclass(frozen=True)
class TaskResult:
    """One client's result, its payload, if any, and the round that its node states."""

    round: Round
    result: ClientResult
    payload: bytes | None


Results = Iterator[tuple[ClientInfo, TaskResult | str]]
"""Each client's result; a string is the reason for its absence."""


class TaskExchange:
    """Sends the tasks of one run to the nodes of their clients."""

    def __init__(self, transport: Transport, registry: NodeRegistry, run: str, deadline: float, poll: float) -> None:
        """`deadline` and `poll`, the polling interval, are in seconds."""
        self._transport, self._registry, self._run = transport, registry, run
        self._deadline, self._poll = deadline, poll

    def send(
        self, kind: Kind, rnd: Round, sent: Mapping[ClientInfo, Tensors], pending: Mapping[ClientInfo, Tensors]
    ) -> Results:
        """Sends the requests immediately; yields the results in the order of `sent`, until the deadline."""
        found: dict[str, TaskResult | str] = {}
        messages: dict[int, bytes] = {}
        names: dict[int, str] = {}
        connected = set(self._transport.nodes())
        for name, node in self._registry.nodes.items():
            own = {client: download for client, download in sent.items() if client in node.clients}
            if own and node.flower_id in connected:
                names[node.flower_id] = name
                messages[node.flower_id] = self._request(kind, rnd, node, own, pending)
            elif own:
                found |= {client.id: "its node is not connected" for client in own}
        message_ids = self._transport.send(messages, self._deadline) if messages else {}
        for flower_id in messages.keys() - set(message_ids.values()):
            found |= {client.id: "delivery to its node failed" for client in self._registry.nodes[names[flower_id]].clients}
        return self._results(list(sent), message_ids, names, found, time.monotonic() + self._deadline)

    def _results(
        self,
        clients: Sequence[ClientInfo],
        message_ids: dict[str, int],
        names: Mapping[int, str],
        found: dict[str, TaskResult | str],
        until: float,
    ) -> Results:
        for client in clients:
            while client.id not in found:
                if not self._collect(message_ids, names, found):
                    if time.monotonic() > until:
                        found[client.id] = f"no reply within {self._deadline:g} s (deploy.deadline)"
                    else:
                        time.sleep(self._poll)
            yield client, found.pop(client.id)
        for name in names.values():
            self._registry.nodes[name].in_flight.clear()  # base updates not reported by now did not arrive

    def _collect(self, message_ids: dict[str, int], names: Mapping[int, str], found: dict[str, TaskResult | str]) -> bool:
        """Collects new replies; returns whether there were any. Uses a client's first result from its own node."""
        replies = self._transport.collect(list(message_ids)) if message_ids else {}
        for message_id, reply in replies.items():
            node = self._registry.nodes[names[message_ids.pop(message_id)]]
            own = {client.id for client in node.clients}
            decoded = _decode_reply(reply, node.max_clients)
            if isinstance(decoded, str):
                found |= dict.fromkeys(own, decoded)
                continue
            done, payloads = decoded
            node.base_updates = done.base_updates
            found |= dict.fromkeys(own, "missing in its node's reply")
            for result in done.results:
                if result.id in own:
                    found[result.id] = _task_result(done, result, payloads)
        return bool(replies)

    def _request(
        self,
        kind: Kind,
        rnd: Round,
        node: RegisteredNode,
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
                acknowledged=None if last is None else AcknowledgedRecord(index=last.round, share=last.share),
            )
            for client, download in sent.items()
            for last in [rnd.acknowledged.get(client.id)]
        ]
        request = TaskRequest(
            kind=kind,
            run=self._run,
            round_record=RoundRecord.of(rnd),
            expected_base_updates=node.expected_base_updates(),
            tasks=tasks,
        )
        node.in_flight |= {index for client in sent if client in pending for index in base_update_indices(pending[client])}
        return encode_message(request, list(payloads))


def _decode_reply(reply: bytes | str, max_clients: int) -> tuple[Done, list[bytes]] | str:
    """Decodes a node's reply to a task request; a string is the reason if there is none or it is invalid."""
    if isinstance(reply, str):
        return reply
    try:
        header, payloads = decode_message(reply, max_clients)
    except ValueError as error:
        return f"its node sent {error}"
    if isinstance(header, Rejected):
        return str(header.failure)
    return (header, payloads) if isinstance(header, Done) else f"its node replied with {header.kind!r}"


def _task_result(done: Done, result: ClientResult, payloads: Sequence[bytes]) -> TaskResult | str:
    if result.failure is not None:
        return str(result.failure)
    if result.payload is None:
        return TaskResult(done.round_record.round(), result, None)
    if result.payload >= len(payloads):
        return "its payload is missing"
    return TaskResult(done.round_record.round(), result, payloads[result.payload])
