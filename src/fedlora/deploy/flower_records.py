"""Conversion between bytes and Flower records."""

from flwr.app import Array, ArrayRecord, Message, RecordDict

_RECORD, _ARRAY, _TYPE = "fedlora", "message", "fedlora.wire"


def to_record(content: bytes) -> RecordDict:
    """Record with one array of bytes, which Flower splits into chunks if it is large."""
    return RecordDict({_RECORD: ArrayRecord({_ARRAY: Array("uint8", (len(content),), _TYPE, content)})})


def from_record(message: Message) -> bytes:
    """Inverse of `to_record`.

    Raises:
        ValueError: the message has any other content.
    """
    records = message.content.array_records
    if list(records) != [_RECORD] or list(records[_RECORD]) != [_ARRAY]:
        raise ValueError("not a message of fedlora")
    return bytes(records[_RECORD][_ARRAY].data)
