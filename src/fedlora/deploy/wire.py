"""Messages between server and nodes: one byte string with a validated JSON header and payloads of tensors."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, ValidationError

from fedlora.deploy.reasons import NodeFailure, Reason
from fedlora.messages import Acknowledged, ClientInfo, Round

PROTOCOL = 5
MAX_BYTES = 2**31 - 1
_MAGIC = b"fedlora\x01"
_DIGEST = 16
_FIXED = len(_MAGIC) + _DIGEST + 8
_HEADER_BYTES = 2**20  # an experiment, a list of labels, the indices of some 100,000 base updates
_HEADER_BYTES_PER_CLIENT = 2**12

Kind = Literal["train", "evaluate", "save_adapter"]
"""Tasks that a server requests of clients."""

Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, ser_json_inf_nan="constants")


def _at_most_clients(entries: Any, info: Any) -> Any:
    """Rejects a list of more clients than the reader expects, before its elements are constructed."""
    if info.context is not None and isinstance(entries, list) and len(entries) > info.context["clients"]:
        raise ValueError(f"{len(entries)} entries, expected at most {info.context['clients']}")
    return entries


LimitedToClients = BeforeValidator(_at_most_clients)


class ClientRecord(_Part):
    """Serializable `ClientInfo`."""

    id: Annotated[str, Field(min_length=1, max_length=200)]
    rank: Annotated[int, Field(ge=1, lt=2**31)]
    examples: Annotated[int, Field(ge=1, lt=2**63)]

    @classmethod
    def of(cls, client: ClientInfo) -> "ClientRecord":
        """Converts from `ClientInfo`."""
        return cls(id=client.id, rank=client.rank, examples=client.examples)

    def info(self) -> ClientInfo:
        """Converts to `ClientInfo`."""
        return ClientInfo(self.id, self.rank, self.examples)


class RoundRecord(_Part):
    """Serializable `Round`."""

    index: Count
    seed: Annotated[int, Field(ge=0)]
    attempt: Count
    registered: Count = 0
    expected_cohort: Count = 0

    @classmethod
    def of(cls, rnd: Round) -> "RoundRecord":
        """Converts from `Round`, without the acknowledgements, which belong to the clients' tasks."""
        return cls(
            index=rnd.index,
            seed=rnd.seed,
            attempt=rnd.attempt,
            registered=rnd.registered,
            expected_cohort=rnd.expected_cohort,
        )

    def round(self, acknowledged: Mapping[str, Acknowledged] | None = None) -> Round:
        """Converts to `Round`, with the acknowledgements of some clients."""
        known = acknowledged or {}
        return Round(self.index, self.seed, self.attempt, self.registered, self.expected_cohort, known)


class AcknowledgedRecord(_Part):
    """The round of a client's last upload that entered the server's state, and its share of the weights."""

    index: Count
    share: Annotated[FiniteFloat, Field(ge=0, le=1)]


class Handshake(_Part):
    """Server to node: the experiment and the number of complete rounds.

    `labels` are the class names of the server's data. `server_session_id` is new whenever the server starts or resumes the
    run, after `done` complete rounds: state of later rounds from an earlier session is discarded.
    """

    kind: Literal["handshake"] = "handshake"
    protocol: int
    version: str
    run: str
    experiment: str
    labels: list[str]
    server_session_id: str
    done: Count


class HandshakeReply(_Part):
    """Node to server: its clients, its base model, and the base updates that it already holds."""

    kind: Literal["handshake_reply"] = "handshake_reply"
    protocol: int
    version: str
    node: str
    base: str
    clients: Annotated[list[ClientRecord], LimitedToClients]
    base_updates: list[Count]


class ClientTask(_Part):
    """One client's part of a task request. `download` and `base_updates` are indices of payloads."""

    client: ClientRecord
    download: Count
    base_updates: Count | None = None
    acknowledged: AcknowledgedRecord | None = None


class TaskRequest(_Part):
    """Server to node: request that these clients train, evaluate, or save their final adapter.

    `expected_base_updates` are those that the server expects the node to hold.
    """

    kind: Kind
    run: str
    round_record: RoundRecord
    expected_base_updates: list[Count]
    tasks: Annotated[list[ClientTask], LimitedToClients]


class Failure(_Part):
    """Reason for a missing result: a code, and the number of affected items if counted."""

    reason: Reason
    count: Count = 0

    @classmethod
    def of(cls, declined: NodeFailure) -> "Failure":
        """Converts from `NodeFailure`."""
        return cls(reason=declined.reason, count=declined.count)

    def __str__(self) -> str:
        return self.reason.value + (f" ({self.count})" if self.count else "")


class ClientResult(_Part):
    """One client's result: an upload and its weight, or statistics and their number of examples, or a failure.

    `payload` is the index of the payload with the upload or the statistics.
    """

    id: str
    payload: Count | None = None
    weight: FiniteFloat = 0.0
    loss: float = 0.0
    steps: Count = 0
    examples: Count = 0
    failure: Failure | None = None


class Done(_Part):
    """Node to server: the results of a task request, and the base updates that the node now holds."""

    kind: Literal["done"] = "done"
    round_record: RoundRecord
    base_updates: list[Count]
    results: Annotated[list[ClientResult], LimitedToClients]


class Rejected(_Part):
    """Node to server: the message was not executed, and the reason."""

    kind: Literal["rejected"] = "rejected"
    failure: Failure


class Notice(_Part):
    """Server to node, for its owner's terminal: the node is rejected, with the reason, or the run is finished."""

    kind: Literal["notice"] = "notice"
    run: str
    state: Literal["rejected", "finished"]
    text: Annotated[str, Field(max_length=1000)] = ""


class Received(_Part):
    """Node to server: acknowledges a notice."""

    kind: Literal["received"] = "received"


class Batch(_Part):
    """Several messages in one, each a payload; answered by a batch of the replies."""

    kind: Literal["batch"] = "batch"


Header = Handshake | HandshakeReply | TaskRequest | Done | Rejected | Notice | Received | Batch


class _Frame(_Part):
    """Header, and the sizes of the payloads that follow it."""

    header: Annotated[Header, Field(discriminator="kind")]
    sizes: list[Count]


def encode_message(header: Header, payloads: Sequence[bytes] = ()) -> bytes:
    """Encodes a message: magic, digest of the rest, the header's length, the header, the payloads.

    Raises:
        ValueError: the message would be larger than `MAX_BYTES`.
    """
    frame = _Frame(header=header, sizes=[len(payload) for payload in payloads]).model_dump_json().encode()
    size = _FIXED + len(frame) + sum(map(len, payloads))
    if size > MAX_BYTES:
        raise ValueError(
            f"a message of {size} bytes is too large, expected at most {MAX_BYTES}; use more nodes or smaller ranks"
        )
    rest = b"".join([len(frame).to_bytes(8, "big"), frame, *payloads])
    return _MAGIC + _digest(rest) + rest


def decode_message(message: bytes, clients: int) -> tuple[Header, list[bytes]]:
    """Returns the header and the payloads of a message that may refer to at most `clients` clients.

    Time and memory are proportional to the bytes needed for that number of clients, whatever the message contains.

    Raises:
        ValueError: not a message of this version, damaged, too large, or with more clients.
    """
    if len(message) > MAX_BYTES:
        raise ValueError(f"a message of {len(message)} bytes is too large, expected at most {MAX_BYTES}")
    if message[: len(_MAGIC)] != _MAGIC or len(message) < _FIXED:
        raise ValueError("not a message of this version of fedlora")
    rest = memoryview(message)[_FIXED - 8 :]
    if message[len(_MAGIC) : _FIXED - 8] != _digest(rest):
        raise ValueError("a damaged message: its digest does not fit")
    length, allowed = int.from_bytes(rest[:8], "big"), _HEADER_BYTES + _HEADER_BYTES_PER_CLIENT * clients
    if length > min(allowed, len(rest) - 8):
        raise ValueError(
            f"a message whose header would have {length} bytes, expected at most {allowed} for {clients} clients"
        )
    try:
        frame = _Frame.model_validate_json(bytes(rest[8 : 8 + length]), context={"clients": clients})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"a message whose header cannot be read: {where}: {first['msg']}") from None
    if 8 + length + sum(frame.sizes) != len(rest):
        raise ValueError("a message whose payloads are not as long as its header says")
    payloads, start = [], 8 + length
    for size in frame.sizes:
        payloads.append(bytes(rest[start : start + size]))
        start += size
    return frame.header, payloads


def _digest(rest: bytes | memoryview) -> bytes:
    return hashlib.blake2b(rest, digest_size=_DIGEST).digest()
