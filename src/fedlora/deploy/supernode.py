"""SuperNode that forwards a server's messages to this node's worker, and the worker's replies to the server.

It uses Flower's Fleet API, but starts no Flower app processes and fetches no app bundle: messages are parsed by the worker
of this installation, and never executed. The worker's socket is the only one that listens on this machine.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Error, Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
    UnregisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.message_pb2 import Message as Envelope
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects, push_objects
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedlora.deploy.address import Address
from fedlora.deploy.flower_records import from_record, to_record
from fedlora.deploy.processes import Printer
from fedlora.deploy.worker_socket import Unreachable, ask
from fedlora.errors import UserError
from fedlora.printable import printable

_POLL_SECONDS = 0.5
_MAX_WAIT_SECONDS = 5.0
_HEARTBEAT_SECONDS = 15.0
_GIVE_UP_SECONDS = 3 * _HEARTBEAT_SECONDS
"""After a SuperNode died, the SuperLink takes two heartbeats to detect that its key is not in use."""
_Worker = Callable[[bytes], bytes]
"""Returns the worker's reply to a message."""
_PUSH_RETRY_SECONDS = (1.0, 5.0, 15.0, 60.0)
_SKEW_SECONDS = 5.0


def run(
    folder: Path,
    server: Address,
    keys: Mapping[str, Path] | None,
    notify: Printer,
    confirm: Callable[[str], bool] | None = None,
) -> None:
    """Forwards messages until it is interrupted; reconnects after the server was unavailable. Prints each state change.

    `keys` are the files `ca` and `key`; None means without TLS, with a key generated for this process. `confirm` asks the
    node's owner a question; None if nobody can be asked.

    Raises:
        UserError: a key file cannot be used, or the server rejects this node.
    """
    private, public = generate_key_pairs() if keys is None else _read_key(keys["key"])
    interceptors: list[ProtobufClientInterceptor] = [
        RuntimeVersionHttpInterceptor("SuperNode"),
        NodeAuthHttpInterceptor(private, public),
    ]
    ca = None if keys is None else _read(keys["ca"])
    worker = partial(ask, folder, until=os.getpid(), notify=notify, confirm=confirm)
    state, rejected_since, wait = f"waiting for the server at {server}", None, _POLL_SECONDS
    notify(state)
    with FleetHttpClient.from_server_address(str(server), keys is None, ca, interceptors) as client:
        while True:
            before = state
            try:
                with _activate(client, public_key_to_bytes(public), registers=keys is None) as node:
                    notify(f"connected to {server}")
                    state, rejected_since, wait = "connected", None, _POLL_SECONDS
                    _forward_messages(client, node, server, worker, notify)
            except httpx.TransportError as error:
                state = _waiting(server, error)
            except httpx.HTTPStatusError as error:
                if state == "connected":
                    state = f"{server} no longer recognizes this node; reconnecting"
                elif reason := _rejection(error.response, keys is not None):
                    rejected_since = rejected_since or time.monotonic()
                    if time.monotonic() - rejected_since > _GIVE_UP_SECONDS:
                        raise UserError(f"{server} rejected this node: {reason}") from None
                    state = f"rejected because {reason}; retrying for {_GIVE_UP_SECONDS:g} s"
                else:
                    state = _waiting(server, error)
            if state != before:
                notify(state)
            time.sleep(wait)
            wait = min(2 * wait, _MAX_WAIT_SECONDS)


@contextmanager
def _activate(client: FleetHttpClient, public: bytes, registers: bool) -> Iterator[Node]:
    """Provides the connected node, and sends its heartbeats in the background."""
    if registers:
        with suppress(httpx.HTTPStatusError):  # it may already be registered
            client.RegisterNode(RegisterNodeFleetRequest(public_key=public))
    activated = client.ActivateNode(ActivateNodeRequest(public_key=public, heartbeat_interval=_HEARTBEAT_SECONDS))
    node, disconnected = Node(node_id=activated.node_id), threading.Event()

    def send_heartbeats() -> None:
        while not disconnected.wait(_HEARTBEAT_SECONDS / 3):
            with suppress(httpx.HTTPError):
                client.SendNodeHeartbeat(SendNodeHeartbeatRequest(node=node, heartbeat_interval=_HEARTBEAT_SECONDS))

    threading.Thread(target=send_heartbeats, daemon=True).start()
    try:
        yield node
    finally:
        disconnected.set()
        with suppress(httpx.HTTPError):
            client.DeactivateNode(DeactivateNodeRequest(node_id=node.node_id))
            if registers:
                client.UnregisterNode(UnregisterNodeFleetRequest(node_id=node.node_id))


def _forward_messages(client: FleetHttpClient, node: Node, server: Address, worker: _Worker, notify: Printer) -> None:
    """Replies to messages one by one, until the server no longer recognizes this node."""
    unreachable = ""
    while True:
        try:
            pulled = client.PullMessages(PullMessagesRequest(node=node))
        except httpx.TransportError as error:
            before, unreachable = unreachable, _waiting(server, error)
            if unreachable != before:
                notify(unreachable)
            time.sleep(_MAX_WAIT_SECONDS)
            continue
        if unreachable:
            notify(f"connected to {server}")
            unreachable = ""
        for envelope, tree in zip(pulled.messages_list, pulled.message_object_trees, strict=True):
            try:
                _answer(client, node, envelope, tree, worker, notify)
            except Exception as error:  # concerns one message: its run has ended, or it is not readable
                notify(f"a message of run {envelope.metadata.run_id} has no reply: {_describe(error)}")
        if not pulled.messages_list:
            time.sleep(_POLL_SECONDS)


def _answer(
    client: FleetHttpClient, node: Node, envelope: Envelope, tree: ObjectTree, worker: _Worker, notify: Printer
) -> None:
    run_id, started = envelope.metadata.run_id, time.perf_counter()
    pull = make_pull_object_fn_protobuf(client.PullObject, node, run_id)
    contents = pull_objects([part.object_id for part in iterate_object_tree(tree)], pull)
    message = inflate_object_from_contents(tree.object_id, contents)
    client.ConfirmMessageReceived(ConfirmMessageReceivedRequest(node=node, run_id=run_id, message_object_id=tree.object_id))
    assert isinstance(message, Message)
    message.metadata.__dict__["_message_id"] = tree.object_id  # not covered by its own content
    try:
        reply = Message(to_record(worker(from_record(message))), reply_to=message)
    except ValueError:
        notify(f"rejected: run {run_id} is of an app other than fedlora; this node runs only its own installation")
        reply = Message(Error(ErrorCode.INVALID_FAB, "this node runs fedlora only"), reply_to=message)
    except Unreachable as error:
        notify(str(error))
        reply = Message(Error(ErrorCode.CLIENT_APP_CRASHED, "the node's worker is not responding"), reply_to=message)
    seconds = time.perf_counter() - started
    for wait in _PUSH_RETRY_SECONDS:  # a lost connection should not discard hours of work
        try:
            return _push(client, node, reply, seconds)
        except httpx.TransportError:
            time.sleep(wait)
    _push(client, node, reply, seconds)


def _push(client: FleetHttpClient, node: Node, reply: Message, seconds: float) -> None:
    reply.metadata.__dict__["_message_id"] = reply.object_id
    envelope = message_to_proto(remove_content_from_message(reply))
    with no_object_id_recompute():
        pushed = client.PushMessages(
            PushMessagesRequest(
                node=node,
                messages_list=[envelope],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[seconds],
            )
        )
        push = make_push_object_fn_protobuf(client.PushObject, node, envelope.metadata.run_id, pushed.session_id)
        push_objects(get_all_nested_objects(reply), push, object_ids_to_push=set(pushed.objects_to_push))


def _waiting(server: Address, error: httpx.HTTPError) -> str:
    skew = _skew(error.response) if isinstance(error, httpx.HTTPStatusError) else None
    return f"waiting for the server at {server}: {skew or _describe(error)}"


def _rejection(response: httpx.Response, with_key: bool) -> str | None:
    """Reason why the server rejects this node, None if the response states no rejection."""
    if response.status_code != httpx.codes.PRECONDITION_FAILED:
        return None
    if not with_key:
        return "it requires a key; join with --key and --ca"
    return "this node's key is not registered there, or another node with this key is connected"


def _skew(response: httpx.Response) -> str | None:
    """Describes the clock difference, None if within limits: the server rejects requests that are too old by its clock."""
    try:
        server_time = parsedate_to_datetime(response.headers["date"])
    except (KeyError, ValueError):
        return None
    skew = (datetime.now(UTC) - server_time).total_seconds()
    if abs(skew) < _SKEW_SECONDS:
        return None
    return f"this machine's clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the server's; set the clock"


def _describe(error: Exception) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"it responds with status {error.response.status_code}"
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        reason = text.partition("certificate verify failed: ")[2].partition(" (_ssl")[0]
        return f"its certificate is not valid: {reason or text}"
    return text or type(error).__name__


def _read_key(path: Path) -> tuple[ec.EllipticCurvePrivateKey, ec.EllipticCurvePublicKey]:
    try:
        key = load_ssh_private_key(_read(path), None)
    except ValueError as error:
        raise UserError(f"{path}: is not a private key made by fedlora keys: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UserError(f"{path}: is not a private key made by fedlora keys")
    return key, key.public_key()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


if __name__ == "__main__":
    folder, server, *files = sys.argv[1:]
    keys = dict(zip(("key", "ca"), map(Path, files), strict=True)) if files else None
    try:
        run(Path(folder), Address.parse(server), keys, lambda line: print(printable(line), flush=True))
    except UserError as error:
        sys.exit(printable(str(error)))
