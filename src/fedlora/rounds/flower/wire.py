"""What server and nodes say to each other, as one byte string: a checked header in JSON, and payloads of tensors."""

import hashlib
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from fedlora.messages import ClientInfo, Round

PROTOCOL = 1
MOST_BYTES = 2**31 - 1
_MAGIC = b"fedlora\x01"
_DIGEST = 16
_FIXED = len(_MAGIC) + _DIGEST + 8
_MOST_HEADER = 64 * 2**20

Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, ser_json_inf_nan="constants")


class Person(_Part):
    """A client, as `ClientInfo`."""

    id: Annotated[str, Field(min_length=1, max_length=200)]
    rank: Annotated[int, Field(ge=1)]
    examples: Annotated[int, Field(ge=1)]

    @classmethod
    def of(cls, who: ClientInfo) -> "Person":
        """The client for the wire."""
        return cls(id=who.id, rank=who.rank, examples=who.examples)

    def info(self) -> ClientInfo:
        """The client for the loop."""
        return ClientInfo(self.id, self.rank, self.examples)


class When(_Part):
    """A round, as `Round`."""

    index: Count
    seed: Count
    attempt: Count

    @classmethod
    def of(cls, rnd: Round) -> "When":
        """The round for the wire."""
        return cls(index=rnd.index, seed=rnd.seed, attempt=rnd.attempt)

    def round(self) -> Round:
        """The round for the loop."""
        return Round(self.index, self.seed, self.attempt)


class Hello(_Part):
    """Server to node: what is run, and how far it has come.

    `labels` are the names that the server's data give to the classes. `life` is new whenever the server starts or takes up
    the run, after `done` complete rounds: what an earlier life left of later rounds does not count.
    """

    kind: Literal["hello"] = "hello"
    protocol: int
    version: str
    run: str
    experiment: str
    labels: list[str]
    life: str
    done: Count


class Present(_Part):
    """Node to server: who is there, on which base model, and which folds it holds already."""

    kind: Literal["present"] = "present"
    protocol: int
    version: str
    node: str
    base: str
    clients: list[Person]
    folds: list[Count]


class Errand(_Part):
    """One client's part of an order. `got` and `folds` are numbers of payloads."""

    who: Person
    got: Count
    folds: Count | None = None


class Order(_Part):
    """Server to node: have these clients work, judge, or keep their adapter as it is after the run.

    `held` are the folds that the node is believed to hold.
    """

    kind: Literal["turn", "judge", "keep"]
    run: str
    when: When
    held: list[Count]
    errands: list[Errand]


class Answer(_Part):
    """One client's result: an upload (the number of a payload) and its weight, or a score, or why there is none."""

    id: str
    upload: Count | None = None
    weight: FiniteFloat = 0.0
    notes: dict[str, float] = {}
    examples: Count = 0
    metrics: dict[str, FiniteFloat] = {}
    error: str | None = None


class Done(_Part):
    """Node to server: the results of an order, and the folds that the node holds now."""

    kind: Literal["done"] = "done"
    when: When
    folds: list[Count]
    answers: list[Answer]


class Refused(_Part):
    """Node to server: nothing was done, and why."""

    kind: Literal["refused"] = "refused"
    reason: str


class Bundle(_Part):
    """Several messages in one, each a payload; answered by a bundle of the answers."""

    kind: Literal["bundle"] = "bundle"


Header = Hello | Present | Order | Done | Refused | Bundle


class _Frame(_Part):
    """The header and the sizes of the payloads behind it."""

    header: Annotated[Header, Field(discriminator="kind")]
    sizes: list[Count]


def seal(header: Header, payloads: Sequence[bytes] = ()) -> bytes:
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


def unseal(message: bytes) -> tuple[Header, list[bytes]]:
    """The header and the payloads of a message.

    Raises:
        ValueError: the bytes are no message of this version, are damaged or too large; allocates only their size.
    """
    if len(message) > MOST_BYTES:
        raise ValueError(f"a message of {len(message)} bytes is too large, allowed are {MOST_BYTES}")
    if message[: len(_MAGIC)] != _MAGIC or len(message) < _FIXED:
        raise ValueError("not a message of this version of fedlora")
    rest = memoryview(message)[_FIXED - 8 :]
    if message[len(_MAGIC) : _FIXED - 8] != _digest(rest):
        raise ValueError("a damaged message: its digest does not fit")
    length = int.from_bytes(rest[:8], "big")
    if length > min(_MOST_HEADER, len(rest) - 8):
        raise ValueError(f"a message whose header would have {length} bytes")
    try:
        frame = _Frame.model_validate_json(bytes(rest[8 : 8 + length]))
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
