"""Replies of a node to the server's messages. Independent of Flower."""

from collections.abc import Callable, Sequence
from pathlib import Path
from uuid import uuid4

from fedlora.deploy.node_run import NodeRun
from fedlora.deploy.reasons import NodeFailure, Reason, coded_errors
from fedlora.deploy.settings import Settings
from fedlora.deploy.wire import (
    PROTOCOL,
    Batch,
    ClientRecord,
    Failure,
    Handshake,
    HandshakeReply,
    Header,
    Notice,
    Received,
    Rejected,
    TaskRequest,
    decode_message,
    encode_message,
)
from fedlora.rounds import durable
from fedlora.runs.client_folder import client_folder
from fedlora.runs.folder import RunFolder
from fedlora.version import __version__

_HANDSHAKE = "handshake.json"


class Node:
    """Clients of one machine, sharing one resident model; persistent state is in the folder.

    name                             this node's own name, independent of its Flower node id
    runs/RUN/handshake.json          the server's handshake
    runs/RUN/accepted.txt            what the server asked for, when the owner was asked and accepted it
    runs/RUN/usage.json              trainings and bytes so far, with a policy
    runs/RUN/sent/CLIENT             the client's last upload, under privacy for records
    ledger/DATA.json                 the privacy that the data have spent in all runs, unless the policy names a folder
    runs/RUN/clients, base_updates   as in a run's folder
    runs/RUN/adapter/CLIENT          the client's adapter, after a run with a personal method

    `notify` receives lines for the node's owner, including the text of errors; a reply contains only an error's code.
    `confirm` asks the owner a question; None if nobody can be asked.
    """

    def __init__(
        self,
        folder: Path,
        notify: Callable[[str], None] = print,
        confirm: Callable[[str], bool] | None = None,
    ) -> None:
        """Reads the settings.

        Raises:
            UserError: the folder has no settings.
        """
        self._folder, self._notify, self._confirm = folder, notify, confirm
        self._runs: dict[str, NodeRun] = {}
        self._settings = Settings.read(folder)
        name = folder / "name"
        if not name.exists():
            durable.replace(name, uuid4().hex.encode())
        self._name = name.read_text()

    def reply(self, message: bytes, in_batch: bool = False) -> bytes:
        """Returns the reply to any message; `Rejected` if it cannot be decoded or executed."""
        try:
            with coded_errors(Reason.MESSAGE, self._notify):
                header, payloads = decode_message(message, len(self._settings.clients))
            if isinstance(header, Batch) and not in_batch:
                return encode_message(header, [self.reply(payload, in_batch=True) for payload in payloads])
            with coded_errors(Reason.INTERNAL, self._notify):
                return encode_message(*self._reply(header, payloads))
        except NodeFailure as failure:
            return encode_message(Rejected(failure=Failure.of(failure)))

    def _reply(self, header: Header, payloads: Sequence[bytes]) -> tuple[Header, list[bytes]]:
        match header:
            case Handshake():
                return self._accept_handshake(header), []
            case TaskRequest():
                run = self._run(header.run)
                run.require_base_updates(header.expected_base_updates)
                self._notify(f"{run.describe(header)} for {len(header.tasks)} client(s)")
                return run.execute(header, payloads)
            case Notice(state=state, text=text):
                self._notify(f"{state}: {text}")
                return Received(), []
        self._notify(f"unexpected message {header.kind!r}")
        raise NodeFailure(Reason.MESSAGE)

    def _accept_handshake(self, handshake: Handshake) -> HandshakeReply:
        """Loads the run; discards the state of rounds that an earlier session of the server did not complete."""
        if (handshake.protocol, handshake.version) != (PROTOCOL, __version__):
            return HandshakeReply(
                protocol=PROTOCOL, version=__version__, node=self._name, base="", clients=[], base_updates=[]
            )
        folder = self._run_folder(handshake.run)
        durable.folder(folder)
        if handshake.run in self._runs:
            self._runs.pop(handshake.run).release()
        if (folder / _HANDSHAKE).exists() and _read(folder).server_session_id != handshake.server_session_id:
            earlier = RunFolder(folder)
            earlier.forget(handshake.done)
            earlier.release()
        durable.replace(folder / _HANDSHAKE, handshake.model_dump_json().encode())
        run = self._run(handshake.run)
        return HandshakeReply(
            protocol=PROTOCOL,
            version=__version__,
            node=self._name,
            base=run.base,
            clients=[ClientRecord.of(client) for client in run.clients()],
            base_updates=run.merged_updates,
        )

    def _run(self, run: str) -> NodeRun:
        """The run in memory; loaded from the handshake on disk if necessary."""
        if run not in self._runs:
            while len(self._runs) >= self._settings.experiments:
                self._runs.pop(next(iter(self._runs))).release()
            path = self._run_folder(run)
            if not (path / _HANDSHAKE).exists():
                raise NodeFailure(Reason.HANDSHAKE)
            self._runs[run] = NodeRun.load(_read(path), path, self._settings, self._notify, self._confirm)
        return self._runs[run]

    def _run_folder(self, run: str) -> Path:
        return self._folder / "runs" / client_folder(run)


def _read(folder: Path) -> Handshake:
    return Handshake.model_validate_json((folder / _HANDSHAKE).read_bytes())
