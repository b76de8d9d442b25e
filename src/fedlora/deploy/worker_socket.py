"""Unix socket between a node's SuperNode and its resident worker. Without expensive imports.

A message is preceded by its length in eight bytes. Before its reply, the worker may send notes for the node's owner, and
questions, which are answered by `YES` or `NO`; the first byte distinguishes them. The socket is in the node's folder,
accessible to its owner only.
"""

import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedlora.deploy.log_file import last_log_line

NAME = "worker.sock"
LOG = "worker.log"
_START_SECONDS = 120.0
_END_SECONDS = 10.0
_MAX_BYTES = 2**31
NOTE, QUESTION, REPLY = b"n", b"q", b"r"
YES, NO = b"y", b"n"


class Unreachable(Exception):
    """No worker is running, and starting one failed."""


def ask(
    folder: Path,
    message: bytes,
    until: int,
    notify: Callable[[str], None],
    confirm: Callable[[str], bool] | None = None,
) -> bytes:
    """Returns the worker's reply; `notify` receives its notes, `confirm` answers its questions; without it, no is the
    answer. If necessary, starts a worker, which ends with process `until`.

    A worker that crashes on the message is restarted once: an interrupted round leaves no state that would affect its
    repetition.

    Raises:
        Unreachable: the worker could not be started, or crashed twice.
    """
    for _ in range(2):
        with _connected(folder, until) as connection:
            worker = _listener(connection)
            try:
                send(connection, message)
                while (frame := receive(connection))[:1] != REPLY:
                    text = frame[1:].decode(errors="replace")
                    if frame[:1] == NOTE:
                        notify(text)
                    else:
                        send(connection, YES if confirm is not None and confirm(text) else NO)
                return frame[1:]
            except (OSError, EOFError):
                _await_end(worker)
    raise Unreachable(f"the worker crashed twice on one message; last log line: {last_log_line(folder / LOG)}")


def send(connection: socket.socket, message: bytes) -> None:
    """Sends one message."""
    connection.sendall(len(message).to_bytes(8, "big"))
    connection.sendall(message)


def receive(connection: socket.socket) -> bytes:
    """Receives one message.

    Raises:
        EOFError: the peer disconnected first.
        OSError: the connection failed, or the message would be larger than 2 GiB.
    """
    size = int.from_bytes(_exactly(connection, 8), "big")
    if size > _MAX_BYTES:
        raise OSError(f"a message of {size} bytes is too large")
    return _exactly(connection, size)


@contextmanager
def short_path(folder: Path) -> Iterator[str]:
    """Path of the socket through an open descriptor: a socket's path is limited to 107 bytes, a folder's is not."""
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
            if time.monotonic() > give_up or worker.poll() not in (None, 0):  # 0: another worker started first
                raise Unreachable(f"the worker does not start; last log line: {last_log_line(folder / LOG)}") from None
            time.sleep(0.05)
    with connection:
        yield connection


def _listener(connection: socket.socket) -> int:
    """The process that listens at the other end."""
    pid: int = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))[0]
    return pid


def _await_end(pid: int) -> None:
    """Waits at most `_END_SECONDS` until a process that is ending has ended: before, it may still accept connections."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    select.select([process], [], [], _END_SECONDS)
    os.close(process)


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
