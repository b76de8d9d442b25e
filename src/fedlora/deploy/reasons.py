"""Reason codes for a failure on a node, the only information about it that the server gets."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum

from fedlora.errors import RunStopped


class Reason(StrEnum):
    """Reason code. The text of an exception may contain data of the node, so only the node's owner sees it."""

    MESSAGE = "the node could not read the message"
    HANDSHAKE = "the node has received no handshake for this run"
    EXPERIMENT = "the node cannot run the experiment with its own settings"
    MODEL = "the node cannot load the model"
    DATA = "the node's data cannot be used"
    CLIENTS = "the node's clients are not in its data"
    BASE_UPDATES = "the node lacks base updates"
    CLIENT = "the node has no such client"
    DOWNLOAD = "the client could not read its download"
    WORK = "the client's work failed"
    DIVERGED = "the client's work ended in NaN or infinite values"
    MEMORY = "the client ran out of memory"
    STORAGE = "the node could not write its files"
    INTERNAL = "the node failed"
    TERMS = "the node's owner has not accepted the experiment"
    METHOD = "the node's policy does not allow the method"
    TASK = "the node's policy does not allow the task"
    MODEL_NOT_ALLOWED = "the node's policy does not allow the model"
    COLUMNS = "the node's policy does not allow the columns that the task reads"
    ROUNDS = "the node's policy allows fewer rounds"
    COHORT = "the node's policy requires a larger cohort"
    TRAFFIC = "the node's policy allows fewer bytes"
    SECURE = "the node's policy requires secure sums, which this server does not have"
    UNIT = "the node's policy requires another unit of privacy"
    COUNTS = "the node's policy does not allow numbers of examples to be sent"
    BUDGET = "the client's privacy budget is spent"
    LEDGER = "the node's privacy ledger cannot be used"
    NOT_PRIVATE = "in a run with privacy, the node sends nothing else of its examples than trained tensors"


class NodeFailure(Exception):
    """Failure with its code; the cause stays on the node. `count` is the number of affected items, 0 if not counted."""

    def __init__(self, reason: Reason, count: int = 0) -> None:
        super().__init__(reason.value)
        self.reason, self.count = reason, count


@contextmanager
def coded_errors(default: Reason, notify: Callable[[str], None]) -> Iterator[None]:
    """Converts any error in its body to a `NodeFailure`, of reason `default` unless its type determines the reason.

    `notify` receives the text of the error.
    """
    try:
        yield
    except NodeFailure:
        raise
    except Exception as error:
        reason = _reason(error, default)
        notify(f"{reason.value}: {type(error).__name__}: {' '.join(str(error).split())}")
        raise NodeFailure(reason) from None


def _reason(error: BaseException, default: Reason) -> Reason:
    if isinstance(error, RunStopped | OSError):
        return Reason.STORAGE
    memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's, without torch
    return Reason.MEMORY if memory else default
