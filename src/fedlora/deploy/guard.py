"""Access control for the internal interfaces of a SuperLink, by a secret.

A SuperLink has one port for nodes, operators and its own processes, and Flower requires no authentication to start a run,
register a key or claim a task. Access to these interfaces would permit running a program on the server. Each such request
therefore carries a secret, generated for each SuperLink and passed in the environment, which other users cannot read.
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
"""Environment variable that holds the secret."""
HEADER = "fedlora-secret"
NODE_PATHS = "/v1/fleet/"


class Guard:
    """Responds with 403 to requests without the secret, except for the interfaces that nodes need."""

    def __init__(self, app: App, secret: str) -> None:
        self._app, self._secret = app, secret.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] == "lifespan" or (
            scope["type"] == "http" and (_for_nodes(scope["path"]) or self._has_secret(scope))
        ):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"only for the processes of this server\n"})

    def _has_secret(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == HEADER.encode()]
        return len(given) == 1 and hmac.compare_digest(given[0], self._secret)


def _for_nodes(path: str) -> bool:
    return path.startswith(NODE_PATHS) and ".." not in path


def send_secret() -> None:
    """Adds the secret in the environment, if any, to every request of Flower's clients in this process."""
    from flwr.supercore.protobuf.client import ProtobufClient

    secret, send = os.environ.get(SECRET), ProtobufClient._send
    if secret is None:
        return

    def sending(client: Any, context: Any, **named: Any) -> Any:
        context.request.headers[HEADER] = secret
        return send(client, context, **named)

    ProtobufClient._send = sending  # type: ignore[method-assign,assignment]
