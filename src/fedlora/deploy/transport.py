"""Interface through which the server exchanges messages with nodes."""

from collections.abc import Collection, Mapping
from typing import Protocol, runtime_checkable

from fedlora.deploy.credential import Credential


@runtime_checkable
class Transport(Protocol):
    """Carries messages to nodes and replies back. Nodes are identified by their Flower node id."""

    def nodes(self) -> Collection[int]:
        """Nodes that are currently connected."""

    def credential(self, node: int) -> Credential | None:
        """Key with which a connected node was authenticated; None if the server has no keys."""

    def send(self, messages: Mapping[int, bytes], seconds: float) -> dict[str, int]:
        """Sends each node its message, which expires after `seconds`; returns message ids and the node of each.

        A node reads its messages in the order in which they were sent.
        """

    def collect(self, message_ids: Collection[str]) -> Mapping[str, bytes | str]:
        """Replies received so far, by message id; a string is the reason for a missing reply."""
