"""Bytes in a Flower message and out of it."""

from flwr.app import Array, ArrayRecord, Message, RecordDict

_RECORD, _ARRAY, _TYPE = "fedlora", "message", "fedlora.wire"


def packed(content: bytes) -> RecordDict:
    """One array of bytes, which Flower cuts into pieces where it is large."""
    return RecordDict({_RECORD: ArrayRecord({_ARRAY: Array("uint8", (len(content),), _TYPE, content)})})


def unpacked(message: Message) -> bytes:
    """The inverse of `packed`.

    Raises:
        ValueError: the message holds something else.
    """
    records = message.content.array_records
    if list(records) != [_RECORD] or list(records[_RECORD]) != [_ARRAY]:
        raise ValueError("not a message of fedlora")
    return bytes(records[_RECORD][_ARRAY].data)
