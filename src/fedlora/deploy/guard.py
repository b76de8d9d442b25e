"""What only the processes of one SuperLink may reach, closed to all others by a secret.

A SuperLink has one port for nodes, for operators and for its own processes, and Flower asks for no login to start a run, to
register a key or to take over a task. Who reaches these could run a program on the server. So each request for them carries
a secret that is made for each SuperLink. It is handed on in the environment, which other users cannot read.
"""

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

SECRET = "FEDLORA_SUPERLINK_SECRET"
"""The environment variable."""
HEADER = "fedlora-secret"
NODES_MAY = "/v1/fleet/"


class Guard:
    """Answers 403 to a request without the secret for anything but what nodes need."""

    def __init__(self, app: App, secret: str) -> None:
        self._app, self._secret = app, secret.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "lifespan" or (scope["type"] == "http" and (_for_nodes(scope["path"]) or self._knows(scope))):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"only for the processes of this server\n"})

    def _knows(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == HEADER.encode()]
        return len(given) == 1 and hmac.compare_digest(given[0], self._secret)


def _for_nodes(path: str) -> bool:
    return path.startswith(NODES_MAY) and ".." not in path


def send_secret() -> None:
    """Has every request of Flower's clients in this process carry the secret of the environment, if there is one."""
    from flwr.supercore.protobuf.client import ProtobufClient

    secret, send = os.environ.get(SECRET), ProtobufClient._send
    if secret is None:
        return

    def sending(client: Any, context: Any, **named: Any) -> Any:
        context.request.headers[HEADER] = secret
        return send(client, context, **named)

    ProtobufClient._send = sending  # type: ignore[method-assign,assignment]
