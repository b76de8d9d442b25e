"""Message handling on a node: a simulation of the node's own clients. Independent of Flower."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import torch
from torch import nn

from fedlora.adapter import Tensors
from fedlora.deploy.local_experiment import local_experiment
from fedlora.deploy.reasons import Declined, Reason, reason_for
from fedlora.deploy.settings import Settings
from fedlora.deploy.wire import (
    PROTOCOL,
    Batch,
    ClientRecord,
    ClientResult,
    Done,
    Failure,
    Handshake,
    HandshakeReply,
    Header,
    Notice,
    Received,
    Refused,
    TaskRequest,
    decode_message,
    encode_message,
)
from fedlora.exporting.base_updates import with_base_updates
from fedlora.federated_data import FederatedData
from fedlora.messages import ClientInfo
from fedlora.rounds import durable
from fedlora.rounds.base_updates import caught_up
from fedlora.rounds.codec import decode, encode
from fedlora.rounds.simulate import SimulationBackend
from fedlora.rounds.validator import Failed
from fedlora.runs.folder import RunFolder, client_folder
from fedlora.session import Session
from fedlora.version import __version__

_Result = tuple[ClientResult, "bytes | None"]
"""Result and upload of one client."""


@dataclass
class _Work:
    """State of one run on this node."""

    session: Session
    folder: RunFolder
    simulation: SimulationBackend
    base: str
    merged_updates: list[int] = field(default_factory=list)
    """Rounds whose base updates have been merged into the model in memory, in order."""


class Node:
    """Clients of one machine, sharing one resident model; persistent state is in the folder.

    name                          this node's own name, independent of its Flower node id
    runs/RUN/hello                the server's handshake
    runs/RUN/clients, base_updates   as in a run's folder
    runs/RUN/adapter/CLIENT       the client's adapter, after a run with a personal method

    `notify` receives lines for the node's owner. Only they contain the text of an error: a reply contains its code.
    """

    def __init__(self, folder: Path, notify: Callable[[str], None] = print) -> None:
        """Reads the settings.

        Raises:
            UserError: the folder has no settings.
        """
        self._folder, self._notify = folder, notify
        self._works: dict[str, _Work] = {}
        self._settings = Settings.read(folder)
        name = folder / "name"
        if not name.exists():
            durable.replace(name, uuid4().hex.encode())
        self._name = name.read_text()

    def reply(self, message: bytes, bundled: bool = False) -> bytes:
        """Returns the reply to any message; `Refused` if it cannot be decoded or executed."""
        try:
            with self._coded(Reason.MESSAGE):
                header, payloads = decode_message(message, len(self._settings.clients))
            if isinstance(header, Batch) and not bundled:
                return encode_message(header, [self.reply(payload, bundled=True) for payload in payloads])
            with self._coded(Reason.INTERNAL):
                return encode_message(*self._answer(header, payloads))
        except Declined as declined:
            return encode_message(Refused(failure=Failure.of(declined)))

    def _answer(self, header: Header, payloads: Sequence[bytes]) -> tuple[Header, list[bytes]]:
        match header:
            case Handshake():
                return self._present(header), []
            case TaskRequest():
                work = self._work(header.run)
                if lost := set(header.held) - set(work.merged_updates):
                    self._notify(f"this node lacks the base updates of the rounds {sorted(i + 1 for i in lost)}")
                    raise Declined(Reason.BASE_UPDATES, len(lost))
                self._notify(f"{_moment(header, work)} for {len(header.tasks)} client(s)")
                return self._done(work, header, payloads)
            case Notice(state=state, text=text):
                self._notify(f"{state}: {text}")
                return Received(), []
        self._notify(f"a node is not asked {header.kind!r}")
        raise Declined(Reason.MESSAGE)

    @contextmanager
    def _coded(self, otherwise: Reason) -> Iterator[None]:
        """Converts any error in its body to a code; `notify` receives the text."""
        try:
            yield
        except Declined:
            raise
        except Exception as error:
            reason = reason_for(error, otherwise)
            self._notify(f"{reason.value}: {type(error).__name__}: {' '.join(str(error).split())}")
            raise Declined(reason) from None

    def _present(self, handshake: Handshake) -> HandshakeReply:
        if (handshake.protocol, handshake.version) != (PROTOCOL, __version__):
            return HandshakeReply(
                protocol=PROTOCOL, version=__version__, node=self._name, base="", clients=[], base_updates=[]
            )
        folder = self._run_folder(handshake.run)
        durable.folder(folder)
        if handshake.run in self._works:
            self._works.pop(handshake.run).folder.release()
        if (folder / "hello").exists() and _handshake(folder).server_session_id != handshake.server_session_id:
            left = RunFolder(folder)
            left.forget(handshake.done)
            left.release()
        durable.replace(folder / "hello", handshake.model_dump_json().encode())
        work = self._work(handshake.run)
        people = [ClientRecord.of(client) for client in work.simulation.registered]
        return HandshakeReply(
            protocol=PROTOCOL,
            version=__version__,
            node=self._name,
            base=work.base,
            clients=people,
            base_updates=work.merged_updates,
        )

    def _work(self, run: str) -> _Work:
        """The run in memory; loaded from the handshake on disk if necessary."""
        if run not in self._works:
            while len(self._works) >= self._settings.experiments:
                self._works.pop(next(iter(self._works))).folder.release()
            path = self._run_folder(run)
            if not (path / "hello").exists():
                raise Declined(Reason.HANDSHAKE)
            self._works[run] = self._load(_handshake(path), path)
        return self._works[run]

    def _load(self, handshake: Handshake, path: Path) -> _Work:
        settings = self._settings
        with self._coded(Reason.EXPERIMENT):
            experiment = local_experiment(handshake.experiment, settings.overrides, settings.data is not None)
        with self._coded(Reason.DATA):
            if settings.data is None:
                federated_data = FederatedData.make(experiment)
            else:
                rank = settings.rank or experiment.method.rank
                federated_data = FederatedData.of_client(
                    experiment, settings.clients[0], settings.data, rank, handshake.labels
                )
            if list(federated_data.labelled_data.labels) != handshake.labels:
                raise ValueError(
                    f"the labels here are {list(federated_data.labelled_data.labels)}, the server's {handshake.labels}"
                )
        members = [client for client in federated_data.clients if client.id in settings.clients]
        if unknown := sorted(set(settings.clients) - {client.id for client in members}):
            self._notify(f"the experiment's division has no client {unknown[0]!r}")
            raise Declined(Reason.CLIENTS, len(unknown))
        with self._coded(Reason.MODEL):
            session = Session.make(experiment, federated_data).on_all_devices()
        base = fingerprint(session.adapted.model)
        folder = RunFolder(path)
        simulation = SimulationBackend(
            session.method, session.adapted.spec, members, folder, session.trainer, experiment.seed
        )
        work = _Work(session, folder, simulation, base)
        for index in folder.base_updates():
            session.trainer.merge_into_base(folder.base_update(index))
            work.merged_updates.append(index)
        return work

    def _done(self, work: _Work, request: TaskRequest, payloads: Sequence[bytes]) -> tuple[Done, list[bytes]]:
        """Executes a request for all its clients together; if that fails, one by one, so that failures stay separate."""
        found: dict[str, _Result] = {}
        sent: dict[ClientInfo, Tensors] = {}
        for task in request.tasks:
            with self._caught(task.client.id, found, Reason.DOWNLOAD):
                client = task.client.info()
                if client not in work.simulation.registered:
                    raise Declined(Reason.CLIENT)
                if task.base_updates is not None:
                    self._base_update(work, payloads[task.base_updates])
                sent[client] = decode(payloads[task.download])
        with suppress(Exception):
            found.update(self._together(work, request, sent))
        for client in sent:
            if client.id not in found:
                with self._caught(client.id, found, Reason.WORK):
                    found.update(self._together(work, request, {client: sent[client]}))
        results: list[ClientResult] = []
        uploads: list[bytes] = []
        for task in request.tasks:
            result, upload = found[task.client.id]
            if upload is not None:
                result = result.model_copy(update={"upload": len(uploads)})
                uploads.append(upload)
            results.append(result)
        return Done(round_record=request.round_record, base_updates=work.merged_updates, results=results), uploads

    def _together(
        self, work: _Work, request: TaskRequest, sent: Mapping[ClientInfo, Tensors]
    ) -> Iterator[tuple[str, _Result]]:
        """Yields the clients' names and results as each group of clients finishes."""
        rnd = request.round_record.round()
        if request.kind == "keep":
            for client, download in sent.items():
                view = with_base_updates(
                    work.simulation.view(client, download, rnd), [work.folder.base_update(i) for i in work.merged_updates]
                )
                work.session.write({client.id: view}, work.folder.path / "adapter", "adapter")
                yield client.id, (ClientResult(id=client.id), None)
        elif request.kind == "evaluate":
            for client, score in work.simulation.evaluate(rnd, sent, {}):
                result = ClientResult(id=client.id)
                if score is not None:
                    result = ClientResult(id=client.id, examples=score.examples, metrics=dict(score.metrics))
                yield client.id, (result, None)
        else:
            for reply in work.simulation.train_clients(rnd, sent, {}):
                if isinstance(reply, Failed):
                    self._notify(f"client {reply.client.id}: {reply.reason}")
                    yield reply.client.id, (ClientResult(id=reply.client.id, failure=Failure(reason=Reason.DIVERGED)), None)
                    continue
                result = ClientResult(id=reply.client.id, weight=reply.weight, notes=dict(reply.notes))
                yield reply.client.id, (result, encode(reply.upload))

    def _base_update(self, work: _Work, payload: bytes) -> None:
        """Applies missing base updates, each once; writes them to disk first, so that a crash loses none."""
        for index, change in caught_up(decode(payload), work.session.adapted.spec).items():
            if index in work.merged_updates:
                continue
            if work.merged_updates and index < work.merged_updates[-1]:
                raise ValueError(
                    f"the base update of round {index + 1} came after that of round {work.merged_updates[-1] + 1}"
                )
            work.folder.save_base_update(index, change)
            work.simulation.merge_into_base(change)
            work.merged_updates.append(index)

    @contextmanager
    def _caught(self, client: str, found: dict[str, _Result], otherwise: Reason) -> Iterator[None]:
        """Records an error in its body as the client's result."""
        try:
            with self._coded(otherwise):
                yield
        except Declined as declined:
            found[client] = ClientResult(id=client, failure=Failure.of(declined)), None

    def _run_folder(self, run: str) -> Path:
        return self._folder / "runs" / client_folder(run)


def _handshake(folder: Path) -> Handshake:
    return Handshake.model_validate_json((folder / "hello").read_bytes())


def fingerprint(model: nn.Module) -> str:
    """Digest of a model's names, shapes, dtypes and values before any base update is merged."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(json.dumps([name, list(value.shape), str(value.dtype)]).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _moment(request: TaskRequest, work: _Work) -> str:
    """Describes the requested task and its round."""
    rounds, index = work.session.experiment.rounds, request.round_record.index
    match request.kind:
        case "train":
            return f"round {index + 1} of {rounds}: training"
        case "evaluate":
            return f"round {index} of {rounds}: evaluating"
    return "after the last round: writing the adapter"
