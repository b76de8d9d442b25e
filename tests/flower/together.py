"""A ServerApp that executes the runs of many folders in lockstep: all share the messages, which Flower carries slowly."""

import os
import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlora.deploy.grid_transport import GridTransport
from fedlora.deploy.server import serve
from fedlora.deploy.wire import Batch, decode_message, encode_message
from fedlora.session import Session
from fedlora.watchdog import end_with

app = ServerApp()


class Together:
    """A transport for several runs, each in a thread: what they send at the same time goes to a node as one message."""

    def __init__(self, transport: GridTransport, runs: int) -> None:
        self._transport, self._nodes = transport, list(transport.nodes())
        self._lock = threading.Condition()
        self._playing, self._arrived, self._flushed = runs, 0, 0
        self._waiting: list[tuple[int, bytes, float]] = []
        self._sent: dict[str, tuple[int, list[int]]] = {}
        self._answers: dict[int, bytes | str] = {}
        self._count, self._looked = 0, 0.0

    def nodes(self) -> Collection[int]:
        return self._nodes

    def credential(self, node: int) -> None:
        """The federation has no keys."""

    def send(self, messages: Mapping[int, bytes], seconds: float) -> dict[str, int]:
        message_ids = {}
        with self._lock:
            for node, message in messages.items():
                message_ids[str(len(self._waiting) + self._count)] = node
                self._waiting.append((node, message, seconds))
            self._arrived += 1
            before = self._flushed
            self._flush_if_all()
            self._lock.wait_for(lambda: self._flushed > before)
        return message_ids

    def leave(self) -> None:
        """One run less, which has ended."""
        with self._lock:
            self._playing -= 1
            self._flush_if_all()

    def _flush_if_all(self) -> None:
        if self._waiting and self._arrived == self._playing:
            self._flush()
            self._arrived, self._flushed = 0, self._flushed + 1
            self._lock.notify_all()

    def _flush(self) -> None:
        for node in self._nodes:
            state = [
                (self._count + i, message) for i, (flower_id, message, _) in enumerate(self._waiting) if flower_id == node
            ]
            if not state:
                continue
            batch = encode_message(Batch(), [message for _, message in state])
            seconds = max(seconds for _, _, seconds in self._waiting)
            for message_id in self._transport.send({node: batch}, seconds):
                self._sent[message_id] = (node, [i for i, _ in state])
        self._count += len(self._waiting)
        self._waiting.clear()

    def collect(self, message_ids: Collection[str]) -> Mapping[str, bytes | str]:
        with self._lock:
            due = self._sent and time.monotonic() - self._looked > 0.5
            for message_id, batch in (self._transport.collect(list(self._sent)) if due else {}).items():
                _, numbers = self._sent.pop(message_id)
                parts = [batch] * len(numbers) if isinstance(batch, str) else decode_message(batch, 1)[1]
                self._answers |= dict(zip(numbers, parts, strict=True))
            self._looked = time.monotonic() if due else self._looked
            return {
                message_id: self._answers.pop(int(message_id))
                for message_id in message_ids
                if int(message_id) in self._answers
            }


@app.main()
def main(grid: Grid, context: Context) -> None:
    end_with(os.getppid())
    folders = sorted(path for path in Path(str(context.run_config["folder"])).iterdir() if path.is_dir())
    transport = GridTransport(grid)
    while len(transport.nodes()) < 4:
        threading.Event().wait(0.5)
    one_at_a_time, make = threading.Lock(), Session.make

    def made(*arguments):  # loading a model draws from the one global generator
        with one_at_a_time:
            return make(*arguments)

    Session.make = made
    together = Together(transport, len(folders))

    def played(path):
        try:
            serve(path, together)
        finally:
            together.leave()

    threads = [threading.Thread(target=played, args=(path,), name=path.name) for path in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
