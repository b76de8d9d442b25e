"""Why a node did not do what it was asked: all that its server is told about a failure."""

from enum import StrEnum

from fedlora.errors import RunStopped


class Reason(StrEnum):
    """A code. The text of an exception may quote the node's data and never leaves the node; its owner sees it there."""

    MESSAGE = "the node could not read the message"
    HANDSHAKE = "the node has received no handshake for this run"
    EXPERIMENT = "the node cannot run the experiment with its own settings"
    MODEL = "the node cannot load the model"
    DATA = "the node's data cannot be used"
    CLIENTS = "the node's clients are not in its data"
    BASE_UPDATES = "the node lacks base updates"
    CLIENT = "the node has no such client"
    DOWNLOAD = "the client could not read what it was sent"
    WORK = "the client's work failed"
    DIVERGED = "the client's work ended in NaN or infinite values"
    MEMORY = "the client ran out of memory"
    STORAGE = "the node could not write its files"
    INTERNAL = "the node failed"


class Declined(Exception):
    """A failure under its code; the cause stays on the node. `count` says how many things are affected, 0: not counted."""

    def __init__(self, reason: Reason, count: int = 0) -> None:
        super().__init__(reason.value)
        self.reason, self.count = reason, count


def reason_for(error: BaseException, otherwise: Reason) -> Reason:
    """The code of a client's or a node's error, where its kind alone tells."""
    if isinstance(error, RunStopped | OSError):
        return Reason.STORAGE
    memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's, without torch
    return Reason.MEMORY if memory else otherwise
