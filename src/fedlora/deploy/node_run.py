"""One run on a node: a simulation of the node's own clients, and the execution of task requests."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedlora.adapter import Tensors
from fedlora.config.policy import Policy
from fedlora.deploy.local_experiment import local_experiment
from fedlora.deploy.reasons import NodeFailure, Reason, coded_errors
from fedlora.deploy.run_privacy import RunPrivacy
from fedlora.deploy.sent_uploads import SentUpload, SentUploads
from fedlora.deploy.settings import Settings
from fedlora.deploy.terms import agree
from fedlora.deploy.usage import Usage
from fedlora.deploy.wire import ClientResult, Done, Failure, Handshake, Kind, RoundRecord, TaskRequest
from fedlora.exporting.base_updates import with_base_updates
from fedlora.federated_data import FederatedData
from fedlora.messages import Acknowledged, ClientInfo, Round
from fedlora.models.weights_digest import weights_digest
from fedlora.rounds.base_updates import caught_up
from fedlora.rounds.budgets import Budgets
from fedlora.rounds.client import Trainer
from fedlora.rounds.codec import decode, encode, encoded_size
from fedlora.rounds.simulate import SimulationBackend
from fedlora.rounds.validator import Failed, UploadValidator, template_upload
from fedlora.run_exports import write_exports
from fedlora.runs.folder import RunFolder
from fedlora.session import Session
from fedlora.train.local import LocalTrainer

_Result = tuple[ClientResult, "bytes | None"]
"""Result and payload of one client."""


@dataclass
class NodeRun:
    """A run in memory. `base` is the digest of the base model before any base update.

    `merged_updates` are the rounds whose base updates have been merged into the model in memory, in order.
    """

    session: Session
    folder: RunFolder
    simulation: SimulationBackend
    base: str
    notify: Callable[[str], None]
    usage: Usage
    privacy: RunPrivacy | None = None
    merged_updates: list[int] = field(default_factory=list)

    @classmethod
    def load(
        cls,
        handshake: Handshake,
        path: Path,
        settings: Settings,
        notify: Callable[[str], None],
        confirm: Callable[[str], bool] | None = None,
    ) -> "NodeRun":
        """Loads data and model, and merges the base updates in the folder `path`.

        Raises:
            NodeFailure: the experiment, the data or the model cannot be used here, or its owner does not allow it.
        """
        with coded_errors(Reason.EXPERIMENT, notify):
            experiment = local_experiment(handshake.experiment, settings.overrides, settings.data is not None)
            agree(experiment, settings, path, notify, confirm)
        with coded_errors(Reason.DATA, notify):
            if settings.data is None:
                federated_data = FederatedData.make(experiment)
            else:
                rank = settings.rank or experiment.method.rank
                federated_data = FederatedData.of_client(
                    experiment, settings.clients[0], settings.data, rank, handshake.labels
                )
            labels = list(federated_data.labelled_data.labels)
            if labels != handshake.labels:
                raise ValueError(f"the labels here are {labels}, the server's {handshake.labels}")
        if unknown := sorted(set(settings.clients) - {client.id for client in federated_data.clients}):
            notify(f"the experiment's partition has no client {unknown[0]!r}")
            raise NodeFailure(Reason.CLIENTS, len(unknown))
        privacy = RunPrivacy.of(experiment, settings, handshake.run, notify)
        with coded_errors(Reason.MODEL, notify):
            session = Session.make(experiment, federated_data)
            if privacy is None:
                session = session.on_all_devices()
        for note in session.notes:
            notify(note)
        base = weights_digest(session.adapted.model)
        clients = [client for client in session.clients if client.id in settings.clients]
        trainer: Trainer = session.trainer
        if privacy is not None:
            assert isinstance(session.trainer, LocalTrainer)
            trainer = privacy.trainer(session.trainer, settings.clients)
            privacy.require_budget(clients, trainer)
        folder = RunFolder(path)
        simulation = replace(session.simulation(folder, clients), trainer=trainer, budgets=Budgets())
        usage = Usage(path, settings.policy or Policy(), notify)
        run = cls(session, folder, simulation, base, notify, usage, privacy)
        for index in folder.base_updates():
            session.trainer.merge_into_base(folder.base_update(index))
            run.merged_updates.append(index)
        return run

    def release(self) -> None:
        """Releases the run's folder."""
        self.folder.release()

    def clients(self) -> Sequence[ClientInfo]:
        """This node's clients."""
        return self.simulation.registered

    def require_base_updates(self, expected: Sequence[int]) -> None:
        """Checks that these base updates have been merged.

        Raises:
            NodeFailure: some have not.
        """
        if missing := set(expected) - set(self.merged_updates):
            self.notify(f"this node lacks the base updates of the rounds {sorted(i + 1 for i in missing)}")
            raise NodeFailure(Reason.BASE_UPDATES, len(missing))

    def describe(self, request: TaskRequest) -> str:
        """Describes the requested task and its round."""
        rounds, index = self.session.experiment.rounds, request.round_record.index
        match request.kind:
            case "train":
                return f"round {index + 1} of {rounds}: training"
            case "evaluate":
                return f"round {index} of {rounds}: evaluating"
        return "after the last round: writing the adapter"

    def execute(self, request: TaskRequest, payloads: Sequence[bytes]) -> tuple[Done, list[bytes]]:
        """Executes a request for all its clients together; if that fails, one by one, so that only one client fails.

        Raises:
            NodeFailure: the request is not one of the accepted experiment, or beyond a limit of the policy.
        """
        self._require_allowed(request.kind, request.round_record, sum(map(len, payloads)))
        found: dict[str, _Result] = {}
        sent: dict[ClientInfo, Tensors] = {}
        for task in request.tasks:
            with self._caught(task.client.id, found, Reason.DOWNLOAD):
                client = task.client.info()
                if client not in self.clients():
                    raise NodeFailure(Reason.CLIENT)
                if task.base_updates is not None:
                    self._apply_base_updates(payloads[task.base_updates])
                sent[client] = decode(payloads[task.download])
        rnd = _round(request)
        if request.kind == "train":
            found |= self._sent_before(rnd, sent)
            sent = {client: download for client, download in sent.items() if client.id not in found}
            self._before_training(rnd, sent)
        with suppress(Exception):
            found.update(self._results(request.kind, rnd, sent))
        for client in sent:
            if client.id not in found:
                with self._caught(client.id, found, Reason.WORK):
                    found.update(self._results(request.kind, rnd, {client: sent[client]}))
        results: list[ClientResult] = []
        own: list[bytes] = []
        for task in request.tasks:
            result, payload = found[task.client.id]
            if payload is not None:
                result = result.model_copy(update={"payload": len(own)})
                own.append(payload)
            results.append(result)
        self.usage.send(sum(map(len, own)), request.kind == "train")
        return Done(round_record=request.round_record, base_updates=self.merged_updates, results=results), own

    def _require_allowed(self, kind: Kind, record: RoundRecord, size: int) -> None:
        """Checks a request against the experiment and the policy, and counts its bytes."""
        rounds, cohort, train = self.session.experiment.rounds, self.usage.policy.cohort, kind == "train"
        if train and record.index >= rounds:
            self.notify(f"{Reason.ROUNDS.value}: the server asked for round {record.index + 1} of {rounds}")
            raise NodeFailure(Reason.ROUNDS)
        if train and record.expected_cohort < cohort and cohort > 1:
            self.notify(f"{Reason.COHORT.value}: {record.expected_cohort} clients in the round, policy.cohort = {cohort}")
            raise NodeFailure(Reason.COHORT)
        if kind == "evaluate" and self.privacy is not None:
            self.notify(f"{Reason.NOT_PRIVATE.value}: the server asked for scores")
            raise NodeFailure(Reason.NOT_PRIVATE)
        self.usage.receive(size, train)

    def _before_training(self, rnd: Round, sent: Mapping[ClientInfo, Tensors]) -> None:
        """Counts the trainings, and checks the bytes of their uploads: one that is not sent would have cost privacy."""
        if self.usage.policy.traffic.round_mb_up is not None:
            validator = UploadValidator(self.session.method, self.session.adapted.spec, rnd, sent)
            uploads = [template_upload(self.session.method, validator.known(client)) for client in sent]
            self.usage.require_upload(sum(encoded_size(upload.flat()) for upload in uploads))
        self.usage.train([client.id for client in sent])
        if self.privacy is not None:
            self.privacy.before_training(list(sent))

    @property
    def _noisy(self) -> bool:
        """Whether uploads have this node's noise, which a repetition would change and pay for again."""
        return self.session.experiment.privacy.unit == "record"

    @property
    def _sent_uploads(self) -> SentUploads:
        return SentUploads(self.folder.path / "sent")

    def _sent_before(self, rnd: Round, sent: Mapping[ClientInfo, Tensors]) -> dict[str, _Result]:
        """The results of clients that have already sent the upload that is asked for."""
        found: dict[str, _Result] = {}
        for client, download in sent.items() if self._noisy else ():
            before = self._sent_uploads.find(client, rnd, download)
            if before is not None:
                if before.state is not None:  # it may have been discarded since
                    self.folder.save_client(client, rnd.index, before.state)
                result = ClientResult(id=client.id, weight=float(client.examples), loss=math.nan)
                found[client.id] = result, encode(before.tensors)
        return found

    def _results(self, kind: Kind, rnd: Round, sent: Mapping[ClientInfo, Tensors]) -> Iterator[tuple[str, _Result]]:
        """Yields the clients' names and results as each group of clients finishes."""
        match kind:
            case "train":
                return self._train(rnd, sent)
            case "evaluate":
                return self._evaluate(rnd, sent)
        return self._save_adapters(rnd, sent)

    def _train(self, rnd: Round, sent: Mapping[ClientInfo, Tensors]) -> Iterator[tuple[str, _Result]]:
        for reply in self.simulation.train_clients(rnd, sent, {}):
            if isinstance(reply, Failed):
                self.notify(f"client {reply.client.id}: {reply.reason}")
                yield reply.client.id, (ClientResult(id=reply.client.id, failure=Failure(reason=Reason.DIVERGED)), None)
                continue
            tensors, client = reply.upload.flat(), reply.client
            result = ClientResult(id=client.id, weight=reply.weight, loss=reply.loss, steps=reply.steps)
            if self._noisy:
                state = self.folder.client_state(client, rnd.index + 1)
                self._sent_uploads.save(client, rnd, sent[client], SentUpload(tensors, state))
            yield client.id, (result, encode(tensors))

    def _evaluate(self, rnd: Round, sent: Mapping[ClientInfo, Tensors]) -> Iterator[tuple[str, _Result]]:
        for client, found in self.simulation.evaluate(rnd, sent, {}):
            if found is None:
                yield client.id, (ClientResult(id=client.id), None)
            else:
                yield client.id, (ClientResult(id=client.id, examples=found.examples), encode(found.sums))

    def _save_adapters(self, rnd: Round, sent: Mapping[ClientInfo, Tensors]) -> Iterator[tuple[str, _Result]]:
        for client, download in sent.items():
            view = with_base_updates(
                self.simulation.view(client, download, rnd), [self.folder.base_update(i) for i in self.merged_updates]
            )
            write_exports(replace(self.session, deployed=True), {client.id: view}, self.folder.path / "adapter", "adapter")
            yield client.id, (ClientResult(id=client.id), None)

    def _apply_base_updates(self, payload: bytes) -> None:
        """Applies missing base updates once, after writing them to disk, so that none is lost by a crash."""
        for index, change in caught_up(decode(payload), self.session.adapted.spec).items():
            if index in self.merged_updates:
                continue
            if self.merged_updates and index < self.merged_updates[-1]:
                raise ValueError(
                    f"the base update of round {index + 1} was received after that of round {self.merged_updates[-1] + 1}"
                )
            self.folder.save_base_update(index, change)
            self.simulation.merge_into_base(change)
            self.merged_updates.append(index)

    @contextmanager
    def _caught(self, client: str, found: dict[str, _Result], default: Reason) -> Iterator[None]:
        """Records an error in its body as the client's result."""
        try:
            with coded_errors(default, self.notify):
                yield
        except NodeFailure as failure:
            found[client] = ClientResult(id=client, failure=Failure.of(failure)), None


def _round(request: TaskRequest) -> Round:
    """The round of the request, with the acknowledgements of its clients."""
    last = {task.client.id: task.acknowledged for task in request.tasks if task.acknowledged is not None}
    return request.round_record.round({one: Acknowledged(found.index, found.share) for one, found in last.items()})
