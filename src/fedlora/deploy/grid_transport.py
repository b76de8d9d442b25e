"""Transport over Flower's Grid."""

from collections.abc import Collection, Mapping

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from fedlora.deploy.credential import Credential
from fedlora.deploy.flower_records import from_record, to_record

_ERRORS = {
    ErrorCode.MESSAGE_UNAVAILABLE: "its node did not receive the message in time",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "its node's reply was too late",
    ErrorCode.NODE_UNAVAILABLE: "its node is no longer connected",
    ErrorCode.INVALID_FAB: "its node runs only its own installation of fedlora",
    ErrorCode.CLIENT_APP_CRASHED: "its node's worker is not responding",
}


class GridTransport:
    """Sends messages through the SuperLink, without blocking for replies."""

    def __init__(self, grid: Grid, credentials: Mapping[bytes, Credential] | None = None) -> None:
        """`credentials` maps the nodes' public keys to credentials; None for a SuperLink without keys."""
        self._grid, self._credentials = grid, credentials
        self._keys: dict[int, bytes] = {}

    def nodes(self) -> Collection[int]:
        """SuperNodes that the SuperLink considers connected."""
        infos: list[NodeInfo] = list(self._grid.get_nodes())
        self._keys = {info.node_id: info.public_key for info in infos}
        return list(self._keys)

    def credential(self, node: int) -> Credential | None:
        """Credential of the key authenticated by the SuperLink; a credential without clients if the key is unknown."""
        if self._credentials is None:
            return None
        return self._credentials.get(self._keys.get(node, b""), Credential("unknown", frozenset()))

    def send(self, messages: Mapping[int, bytes], seconds: float) -> dict[str, int]:
        """Sends the messages one by one, so that a failure to send one does not affect the others."""
        message_ids: dict[str, int] = {}
        for node, content in messages.items():
            message = Message(to_record(content), dst_node_id=node, message_type="query", ttl=seconds)
            message_ids |= {message_id: node for message_id in self._grid.push_messages([message]) if message_id}
        return message_ids

    def collect(self, message_ids: Collection[str]) -> Mapping[str, bytes | str]:
        """Replies that the SuperLink has for these message ids."""
        found: dict[str, bytes | str] = {}
        for message in self._grid.pull_messages(list(message_ids)):
            message_id = message.metadata.reply_to_message_id
            try:
                found[message_id] = _error(message.error.code) if message.has_error() else from_record(message)
            except ValueError as error:
                found[message_id] = str(error)
        return found


def _error(code: int) -> str:
    """This package's text for a Flower error code, since the error's own text is the node's."""
    return _ERRORS.get(code, f"Flower error {code}")
