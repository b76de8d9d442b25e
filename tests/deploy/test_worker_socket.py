"""The socket of a node's worker when the worker ends."""

import os
import subprocess
import sys
import time

from fedlora.deploy import worker_socket
from fedlora.deploy.worker_socket import NAME, NO, YES, ask

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


ASKING = """
import socket, sys
from fedlora.deploy.worker_socket import QUESTION, REPLY, receive, send
listening = socket.socket(socket.AF_UNIX)
listening.bind(sys.argv[1])
listening.listen()
for _ in range(2):
    connection = listening.accept()[0]
    receive(connection)
    send(connection, QUESTION + b"take part?")
    send(connection, REPLY + receive(connection))
"""


def test_a_workers_question_is_answered_by_the_owner_and_with_no_if_there_is_none(tmp_path):
    asked = []

    def confirm(question):
        asked.append(question)
        return True

    with started(ASKING, tmp_path):
        while not (tmp_path / NAME).exists():
            time.sleep(0.01)
        time.sleep(0.05)  # from its name to its listening
        assert ask(tmp_path, b"hello", os.getpid(), print, confirm) == YES
        assert ask(tmp_path, b"hello", os.getpid(), print) == NO
    assert asked == ["take part?"]
