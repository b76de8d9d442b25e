"""What server and nodes say to each other, as one byte string: a checked header in JSON, and payloads of tensors."""

import hashlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, ValidationError

from fedlora.deploy.reasons import Declined, Reason
from fedlora.messages import ClientInfo, Round

PROTOCOL = 2
MOST_BYTES = 2**31 - 1
_MAGIC = b"fedlora\x01"
_DIGEST = 16
_FIXED = len(_MAGIC) + _DIGEST + 8
_HEADER_BYTES = 2**20  # an experiment, a list of labels, the indices of some 100,000 base updates
_HEADER_BYTES_PER_CLIENT = 2**12

Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, ser_json_inf_nan="constants")


def _few(parts: Any, known: Any) -> Any:
    """Rejects a list that speaks of more clients than the reader expects, before its parts are made."""
    if known.context is not None and isinstance(parts, list) and len(parts) > known.context["clients"]:
        raise ValueError(f"{len(parts)} entries, expected at most {known.context['clients']}")
    return parts


Few = BeforeValidator(_few)


class ClientRecord(_Part):
    """A client, as `ClientInfo`."""

    id: Annotated[str, Field(min_length=1, max_length=200)]
    rank: Annotated[int, Field(ge=1, lt=2**31)]
    examples: Annotated[int, Field(ge=1, lt=2**63)]

    @classmethod
    def of(cls, client: ClientInfo) -> "ClientRecord":
        """The client for the wire."""
        return cls(id=client.id, rank=client.rank, examples=client.examples)

    def info(self) -> ClientInfo:
        """The client for the loop."""
        return ClientInfo(self.id, self.rank, self.examples)


class RoundRecord(_Part):
    """A round, as `Round`."""

    index: Count
    seed: Annotated[int, Field(ge=0)]
    attempt: Count

    @classmethod
    def of(cls, rnd: Round) -> "RoundRecord":
        """The round for the wire."""
        return cls(index=rnd.index, seed=rnd.seed, attempt=rnd.attempt)

    def round(self) -> Round:
        """The round for the loop."""
        return Round(self.index, self.seed, self.attempt)


class Handshake(_Part):
    """Server to node: what is run, and how far it has come.

    `labels` are the class names of the server's data. `server_session_id` is new whenever the server starts or resumes the
    run, after `done` complete rounds: what an earlier session left of later rounds does not count.
    """

    kind: Literal["hello"] = "hello"
    protocol: int
    version: str
    run: str
    experiment: str
    labels: list[str]
    server_session_id: str
    done: Count


class HandshakeReply(_Part):
    """Node to server: who is there, on which base model, and which base updates it holds already."""

    kind: Literal["present"] = "present"
    protocol: int
    version: str
    node: str
    base: str
    clients: Annotated[list[ClientRecord], Few]
    base_updates: list[Count]


class ClientTask(_Part):
    """One client's part of an order. `download` and `base_updates` are numbers of payloads."""

    client: ClientRecord
    download: Count
    base_updates: Count | None = None


class TaskRequest(_Part):
    """Server to node: have these clients work, evaluate, or keep their adapter as it is after the run.

    `held` are the base updates that the node is believed to hold.
    """

    kind: Literal["train", "evaluate", "keep"]
    run: str
    round_record: RoundRecord
    held: list[Count]
    tasks: Annotated[list[ClientTask], Few]


class Failure(_Part):
    """Why there is no result: a code, and how many things are affected if they were counted."""

    reason: Reason
    count: Count = 0

    @classmethod
    def of(cls, declined: Declined) -> "Failure":
        """The failure for the wire."""
        return cls(reason=declined.reason, count=declined.count)

    def __str__(self) -> str:
        return self.reason.value + (f" ({self.count})" if self.count else "")


class ClientResult(_Part):
    """One client's result: an upload (the number of a payload) and its weight, or a score, or why there is none."""

    id: str
    upload: Count | None = None
    weight: FiniteFloat = 0.0
    notes: dict[str, float] = {}
    examples: Count = 0
    metrics: dict[str, FiniteFloat] = {}
    failure: Failure | None = None


class Done(_Part):
    """Node to server: the results of an order, and the base updates that the node holds now."""

    kind: Literal["done"] = "done"
    round_record: RoundRecord
    base_updates: list[Count]
    results: Annotated[list[ClientResult], Few]


class Refused(_Part):
    """Node to server: nothing was done, and why."""

    kind: Literal["rejected"] = "rejected"
    failure: Failure


class Notice(_Part):
    """Server to node, for its owner's terminal: the node is rejected, and why; or the run is finished."""

    kind: Literal["notice"] = "notice"
    run: str
    state: Literal["rejected", "finished"]
    text: Annotated[str, Field(max_length=1000)] = ""


class Received(_Part):
    """Node to server: the notice was shown."""

    kind: Literal["received"] = "received"


class Batch(_Part):
    """Several messages in one, each a payload; answered by a bundle of the answers."""

    kind: Literal["bundle"] = "bundle"


Header = Handshake | HandshakeReply | TaskRequest | Done | Refused | Notice | Received | Batch


class _Frame(_Part):
    """The header and the sizes of the payloads behind it."""

    header: Annotated[Header, Field(discriminator="kind")]
    sizes: list[Count]


def encode_message(header: Header, payloads: Sequence[bytes] = ()) -> bytes:
    """A message: magic, digest of the rest, the header's length, the header, the payloads.

    Raises:
        ValueError: it would be larger than `MOST_BYTES`.
    """
    frame = _Frame(header=header, sizes=[len(payload) for payload in payloads]).model_dump_json().encode()
    size = _FIXED + len(frame) + sum(map(len, payloads))
    if size > MOST_BYTES:
        raise ValueError(
            f"a message of {size} bytes is too large, allowed are {MOST_BYTES}; use more nodes or smaller ranks"
        )
    rest = b"".join([len(frame).to_bytes(8, "big"), frame, *payloads])
    return _MAGIC + _digest(rest) + rest


def decode_message(message: bytes, clients: int) -> tuple[Header, list[bytes]]:
    """The header and the payloads of a message that may speak of so many clients.

    Time and memory are proportional to the bytes that so many clients need, whatever else the message holds.

    Raises:
        ValueError: the bytes are no message of this version, are damaged, too large, or speak of more clients.
    """
    if len(message) > MOST_BYTES:
        raise ValueError(f"a message of {len(message)} bytes is too large, allowed are {MOST_BYTES}")
    if message[: len(_MAGIC)] != _MAGIC or len(message) < _FIXED:
        raise ValueError("not a message of this version of fedlora")
    rest = memoryview(message)[_FIXED - 8 :]
    if message[len(_MAGIC) : _FIXED - 8] != _digest(rest):
        raise ValueError("a damaged message: its digest does not fit")
    length, allowed = int.from_bytes(rest[:8], "big"), _HEADER_BYTES + _HEADER_BYTES_PER_CLIENT * clients
    if length > min(allowed, len(rest) - 8):
        raise ValueError(f"a message whose header would have {length} bytes, allowed are {allowed} for {clients} clients")
    try:
        frame = _Frame.model_validate_json(bytes(rest[8 : 8 + length]), context={"clients": clients})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"a message whose header cannot be read: {where}: {first['msg']}") from None
    if 8 + length + sum(frame.sizes) != len(rest):
        raise ValueError("a message whose payloads are not as long as its header says")
    payloads, at = [], 8 + length
    for size in frame.sizes:
        payloads.append(bytes(rest[at : at + size]))
        at += size
    return frame.header, payloads


def _digest(rest: bytes | memoryview) -> bytes:
    return hashlib.blake2b(rest, digest_size=_DIGEST).digest()
