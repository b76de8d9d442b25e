"""Between a node's short-lived processes and its resident worker: a Unix socket. Imports nothing heavy.

A message is its length in eight bytes, and itself. Before its answer the worker may send notes for the node's owner; the
first byte tells them apart. The socket is in the node's folder, its owner's alone: nobody else can connect.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

NAME = "worker.sock"
LOG = "worker.log"
_START_SECONDS = 120.0
_MOST_BYTES = 2**31
NOTE, ANSWER = b"n", b"a"


class Unreachable(Exception):
    """There is no worker, and none could be started."""


def ask(folder: Path, message: bytes, until: int, say: Callable[[str], None]) -> bytes:
    """The worker's answer. Starts a worker if there is none, one that ends with the process `until`. `say` gets its notes.

    A worker that dies over the message is started again, once: a round's work leaves nothing behind that the same work
    would find.

    Raises:
        Unreachable: no worker could be started, or it died twice.
    """
    for _ in range(2):
        with _connected(folder, until) as connection:
            try:
                send(connection, message)
                while (frame := receive(connection))[:1] == NOTE:
                    say(frame[1:].decode(errors="replace"))
                return frame[1:]
            except (OSError, EOFError):
                continue
    raise Unreachable(f"the worker died twice over one message; its last words: {_last_words(folder)}")


def send(connection: socket.socket, message: bytes) -> None:
    """Sends one message."""
    connection.sendall(len(message).to_bytes(8, "big"))
    connection.sendall(message)


def receive(connection: socket.socket) -> bytes:
    """One message.

    Raises:
        EOFError: the other side went away first.
        OSError: likewise, or it would be larger than 2 GiB.
    """
    size = int.from_bytes(_exactly(connection, 8), "big")
    if size > _MOST_BYTES:
        raise OSError(f"a message of {size} bytes")
    return _exactly(connection, size)


@contextmanager
def short_path(folder: Path) -> Iterator[str]:
    """The socket's path by way of an open descriptor: a socket's path may have 107 bytes, a folder's many more."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{NAME}"
    finally:
        os.close(descriptor)


@contextmanager
def _connected(folder: Path, until: int) -> Iterator[socket.socket]:
    worker: subprocess.Popen[bytes] | None = None
    give_up = time.monotonic() + _START_SECONDS
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with short_path(folder) as path:
                connection.connect(path)
            break
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            if worker is None:
                worker = _start(folder, until)
            if time.monotonic() > give_up or worker.poll() not in (None, 0):  # 0: another was quicker
                raise Unreachable(f"the worker does not start; its last words: {_last_words(folder)}") from None
            time.sleep(0.05)
    with connection:
        yield connection


def _start(folder: Path, until: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "fedlora.deploy.worker", str(folder), str(until)]
    with (folder / LOG).open("ab") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def _exactly(connection: socket.socket, size: int) -> bytes:
    parts = bytearray(size)
    view, received = memoryview(parts), 0
    while received < size:
        count = connection.recv_into(view[received:])
        if not count:
            raise EOFError("the connection ended within a message")
        received += count
    return bytes(parts)


def _last_words(folder: Path) -> str:
    lines = (folder / LOG).read_text(errors="replace").splitlines() if (folder / LOG).exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "none")
