"""Flower's SuperLink, with what only its own machine should reach closed to all others.

The SuperLink has one port for nodes, for operators and for its own processes, and nobody has to log in to start a run or to
register a node's key. Whoever reaches the port could have the server and all nodes execute a program of theirs.
"""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from flwr.superlink import main as superlink
from flwr.superlink.cli import flower_superlink

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

NODES_MAY = "/v1/fleet/"
_HERE = ("127.0.0.1", "::1")


class NodesOnly:
    """Answers 403 to a request from another machine for anything but what nodes need."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] not in ("http", "websocket") or _for_nodes(scope["path"]) or _from_here(scope):
            await self._app(scope, receive, send)
            return
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"only from the server's own machine\n"})


def _for_nodes(path: str) -> bool:
    return path.startswith(NODES_MAY) and ".." not in path


def _from_here(scope: Scope) -> bool:
    """Whether the other end of the connection is this machine: a loopback address, or the very address it came to."""
    client, server = scope.get("client") or ("",), scope.get("server") or ("",)
    return client[0] != "" and client[0] in (*_HERE, server[0])


def main() -> None:
    """The `flower-superlink` command, its app behind `NodesOnly`."""
    create = superlink.create_app

    def closed(*arguments: Any, **named: Any) -> Any:
        app = create(*arguments, **named)
        app.add_middleware(NodesOnly)
        return app

    superlink.create_app = closed
    flower_superlink()


if __name__ == "__main__":
    main()
