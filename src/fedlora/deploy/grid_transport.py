"""Transport over Flower's Grid."""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    inflate_object_from_contents,
)
from flwr.superlink.grid.http_grid import HttpGrid

from fedlora.deploy.credential import Credential
from fedlora.deploy.flower_records import from_record, to_record

_ERRORS = {
    ErrorCode.MESSAGE_UNAVAILABLE: "its node did not receive the message in time",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "its node's reply was too late",
    ErrorCode.NODE_UNAVAILABLE: "its node is no longer connected",
    ErrorCode.INVALID_FAB: "its node runs only its own installation of fedlora",
    ErrorCode.CLIENT_APP_CRASHED: "its node's worker is not responding",
}


@dataclass
class _Upload:
    """Reply whose objects its node may still be uploading."""

    tree: ObjectTree
    expires: float  # by time.monotonic()
    contents: dict[str, bytes] = field(default_factory=dict)

    def complete(self, pull: Callable[[str], bytes]) -> bool:
        """Pulls the objects that are missing, as far as they are available; returns whether it has all of them."""
        for part in iterate_object_tree(self.tree):
            if part.object_id not in self.contents:
                try:
                    self.contents[part.object_id] = pull(part.object_id)
                except ObjectUnavailableError:
                    return False
        return True

    def content(self) -> bytes | str:
        """The reply; a string is the reason if it is an error or invalid."""
        try:
            message = inflate_object_from_contents(self.tree.object_id, self.contents)
            assert isinstance(message, Message)
            return _error(message.error.code) if message.has_error() else from_record(message)
        except Exception:  # the objects are the node's: they may have any content
            return "its node's reply is not a message of fedlora"


class GridTransport:
    """Sends messages through the SuperLink, without blocking for replies.

    It pulls replies itself, as `Grid.pull_messages` waits for minutes, with the replies of all nodes, if a single node dies
    during its upload.
    """

    def __init__(self, grid: HttpGrid, credentials: Mapping[bytes, Credential] | None = None) -> None:
        """`credentials` maps the nodes' public keys to credentials; None for a SuperLink without keys."""
        self._grid, self._credentials = grid, credentials
        self._keys: dict[int, bytes] = {}
        self._uploads: dict[str, _Upload] = {}
        self._longest = 0.0  # the longest deadline so far, in seconds

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
        self._longest = max(self._longest, seconds)
        message_ids: dict[str, int] = {}
        for node, content in messages.items():
            message = Message(to_record(content), dst_node_id=node, message_type="query", ttl=seconds)
            message_ids |= {message_id: node for message_id in self._grid.push_messages([message]) if message_id}
        return message_ids

    def collect(self, message_ids: Collection[str]) -> Mapping[str, bytes | str]:
        """Replies to these message ids that the SuperLink has completely; a string is the reason for a missing one."""
        client, node, run_id = self._grid._runtime_client, self._grid.node, self._grid.run.run_id
        now = time.monotonic()
        self._uploads = {message_id: upload for message_id, upload in self._uploads.items() if upload.expires > now}
        asked = [message_id for message_id in message_ids if message_id not in self._uploads]  # each is handed out once
        pulled = client.PullMessages(PullAppMessagesRequest(message_ids=asked))
        trees = zip(pulled.messages_list, pulled.message_object_trees, strict=True)
        self._uploads |= {reply.metadata.reply_to_message_id: _Upload(tree, now + self._longest) for reply, tree in trees}
        pull = make_pull_object_fn_protobuf(client.PullObject, node, run_id)
        found: dict[str, bytes | str] = {}
        for message_id in self._uploads.keys() & set(message_ids):
            upload = self._uploads[message_id]
            try:
                if upload.complete(pull):
                    found[message_id] = upload.content()
                    root = upload.tree.object_id
                    received = ConfirmMessageReceivedRequest(node=node, run_id=run_id, message_object_id=root)
                    client.ConfirmMessageReceived(received)
            except ObjectPullError:
                found[message_id] = "its node's reply was not uploaded completely"
        for message_id in found:
            del self._uploads[message_id]
        return found


def _error(code: int) -> str:
    """This package's text for a Flower error code, since the error's own text is the node's."""
    return _ERRORS.get(code, f"Flower error {code}")
