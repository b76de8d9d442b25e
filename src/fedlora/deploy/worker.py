"""Resident worker of a node: has the model, the examples and the clients' states; replies to one message at a time."""

import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from fedlora.deploy.worker_socket import NOTE, QUESTION, REPLY, YES, receive, send, short_path
from fedlora.printable import printable
from fedlora.watchdog import end_with

LOCK = "worker.lock"
PID = "worker.pid"


def main(folder: Path, until: int) -> int:
    """Answers messages until the process `until` ends; returns the exit code, 0 at once if the node already has a worker.

    It listens before its slow imports, so that the process that started it can connect early.
    """
    try:
        FileLock(folder / LOCK).acquire(timeout=0)
    except Timeout:
        return 0
    end_with(until)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with short_path(folder) as path:
        Path(path).unlink(missing_ok=True)
        listening.bind(path)
    (folder / PID).write_text(str(os.getpid()))
    listening.listen()
    from fedlora.deploy.node import Node
    from fedlora.models.loading import quiet

    quiet()
    connections: list[socket.socket] = []

    def notify(line: str) -> None:
        print(printable(line), flush=True)
        for connection in connections:
            with suppress(OSError):
                send(connection, NOTE + line.encode(errors="replace"))

    def confirm(question: str) -> bool:
        if not connections:
            return False
        send(connections[-1], QUESTION + question.encode())
        return receive(connections[-1]) == YES

    node = Node(folder, notify, confirm)
    while True:
        connection, _ = listening.accept()
        with connection:
            try:
                message, started = receive(connection), time.perf_counter()
                connections.append(connection)
                result = node.reply(message)
                seconds = time.perf_counter() - started
                print(f"{len(message)} bytes answered with {len(result)} in {seconds:.3f} s", flush=True)
                send(connection, REPLY + result)
            except (OSError, EOFError) as error:
                print(f"client disconnected: {error}", file=sys.stderr, flush=True)
            finally:
                connections.clear()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
