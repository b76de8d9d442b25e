"""The socket of a node's worker when the worker ends."""

import os
import subprocess
import sys
import time

from fedlora.deploy import worker_socket
from fedlora.deploy.worker_socket import NAME, ask

ENDING = """
import socket, sys, time
listening = socket.socket(socket.AF_UNIX)
listening.bind(sys.argv[1])
listening.listen()
listening.accept()[0].close()
time.sleep(0.5)
"""
"""Ends a connection first, and stops listening later, as a killed process may."""

ANSWERING = """
import os, socket, sys
from fedlora.deploy.worker_socket import REPLY, receive, send
os.unlink(sys.argv[1])
listening = socket.socket(socket.AF_UNIX)
listening.bind(sys.argv[1])
listening.listen()
connection = listening.accept()[0]
send(connection, REPLY + receive(connection))
"""


def started(code, folder):
    return subprocess.Popen([sys.executable, "-c", code, str(folder / NAME)])


def test_a_message_is_repeated_only_after_the_worker_that_failed_has_ended(tmp_path, monkeypatch):
    workers = []

    def start(folder, until):
        workers.append(started(ANSWERING, folder))
        return workers[-1]

    monkeypatch.setattr(worker_socket, "_start", start)
    with started(ENDING, tmp_path):
        while not (tmp_path / NAME).exists():
            time.sleep(0.01)
        time.sleep(0.05)  # from its name to its listening
        assert ask(tmp_path, b"hello", os.getpid(), print) == b"hello"
    assert [worker.wait(20) for worker in workers] == [0]
