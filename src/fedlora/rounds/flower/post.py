"""The post over Flower's Grid."""

from collections.abc import Collection, Mapping

from flwr.app import Message
from flwr.serverapp import Grid

from fedlora.rounds.flower.parcel import packed, unpacked


class GridPost:
    """Carries messages through the SuperLink; none is waited for."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def nodes(self) -> Collection[int]:
        """The SuperNodes that the SuperLink takes for connected."""
        return list(self._grid.get_node_ids())

    def send(self, letters: Mapping[int, bytes], seconds: float) -> dict[str, int]:
        """One message at a time, so that one that cannot be sent stops no other."""
        tickets: dict[str, int] = {}
        for node, letter in letters.items():
            message = Message(packed(letter), dst_node_id=node, message_type="query", ttl=seconds)
            tickets |= {ticket: node for ticket in self._grid.push_messages([message]) if ticket}
        return tickets

    def collect(self, tickets: Collection[str]) -> Mapping[str, bytes | str]:
        """What the SuperLink has for these tickets."""
        found: dict[str, bytes | str] = {}
        for message in self._grid.pull_messages(list(tickets)):
            ticket = message.metadata.reply_to_message_id
            try:
                found[ticket] = f"Flower says: {message.error.reason}" if message.has_error() else unpacked(message)
            except ValueError as error:
                found[ticket] = str(error)
        return found
