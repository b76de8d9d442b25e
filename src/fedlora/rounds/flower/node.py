"""What a node does with the messages it gets: a small simulation of its own clients. It knows nothing of Flower."""

import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import torch
from torch import nn

from fedlora.adapter import Tensors
from fedlora.config import build
from fedlora.errors import RunStopped, UserError
from fedlora.experiment import Bench, with_folds
from fedlora.messages import ClientInfo
from fedlora.problem import Problem
from fedlora.rounds import durable
from fedlora.rounds.checkpoint import RunFolder, client_folder
from fedlora.rounds.codec import decode, encode
from fedlora.rounds.flower.settings import Settings
from fedlora.rounds.flower.wire import (
    PROTOCOL,
    Answer,
    Bundle,
    Done,
    Header,
    Hello,
    Order,
    Person,
    Present,
    Refused,
    seal,
    unseal,
)
from fedlora.rounds.folds import caught_up
from fedlora.rounds.simulate import Simulation
from fedlora.version import __version__

_FAILURES = (UserError, RunStopped, ValueError, RuntimeError, OSError, IndexError)
"""Of one client, which stop neither the others nor the node."""

_Result = tuple[Answer, "bytes | None"]
"""One client's answer and its upload."""


@dataclass
class _Work:
    """One run on this node."""

    bench: Bench
    folder: RunFolder
    simulation: Simulation
    base: str
    folded: list[int] = field(default_factory=list)
    """The rounds whose folds the model in memory has, in order."""


class Node:
    """The clients of one machine, around one resident model; what must survive is in the folder.

    name                          this node's own, whatever Flower calls it
    runs/RUN/hello                the server's hello
    runs/RUN/clients, folds       as in a run's folder
    runs/RUN/adapter/CLIENT       after a run with a personal method, the client's own
    """

    def __init__(self, folder: Path) -> None:
        """Reads the settings.

        Raises:
            UserError: there are none.
        """
        self._folder = folder
        self._works: dict[str, _Work] = {}
        self._settings = Settings.read(folder)
        name = folder / "name"
        if not name.exists():
            durable.replace(name, uuid4().hex.encode())
        self._name = name.read_text()

    def answer(self, message: bytes) -> bytes:
        """The answer to any message; `Refused` to one that cannot be understood or obeyed."""
        try:
            header, payloads = unseal(message)
            if isinstance(header, Bundle):
                return seal(header, [self.answer(payload) for payload in payloads])
            return seal(*self._answer(header, payloads))
        except (ValueError, UserError, RunStopped) as error:
            return seal(Refused(reason=str(error)))

    def _answer(self, header: Header, payloads: Sequence[bytes]) -> tuple[Header, list[bytes]]:
        match header:
            case Hello():
                return self._present(header), []
            case Order():
                work = self._work(header.run)
                if lost := sorted(set(header.held) - set(work.folded)):
                    raise ValueError(f"node {self._name} lacks the folds of the rounds {[i + 1 for i in lost]}")
                return self._done(work, header, payloads)
        raise ValueError(f"a node is not asked {header.kind!r}")

    def _present(self, hello: Hello) -> Present:
        if (hello.protocol, hello.version) != (PROTOCOL, __version__):
            return Present(protocol=PROTOCOL, version=__version__, node=self._name, base="", clients=[], folds=[])
        folder = self._run_folder(hello.run)
        durable.folder(folder)
        if hello.run in self._works:
            self._works.pop(hello.run).folder.release()
        if (folder / "hello").exists() and _hello(folder).life != hello.life:
            left = RunFolder(folder)
            left.forget(hello.done)
            left.release()
        durable.replace(folder / "hello", hello.model_dump_json().encode())
        work = self._work(hello.run)
        people = [Person.of(who) for who in work.simulation.members]
        return Present(
            protocol=PROTOCOL, version=__version__, node=self._name, base=work.base, clients=people, folds=work.folded
        )

    def _work(self, run: str) -> _Work:
        """The run in memory; loaded from the hello on disk if it is not there."""
        if run not in self._works:
            while len(self._works) >= self._settings.experiments:
                self._works.pop(next(iter(self._works))).folder.release()
            path = self._run_folder(run)
            if not (path / "hello").exists():
                raise ValueError("this node has had no hello for this run")
            self._works[run] = self._load(_hello(path), path)
        return self._works[run]

    def _load(self, hello: Hello, path: Path) -> _Work:
        experiment = build(tomllib.loads(hello.experiment), self._settings.overrides, "the server's experiment")
        if self._settings.data is None:
            problem = Problem.make(experiment)
            if unknown := sorted(set(self._settings.clients) - {who.id for who in problem.members}):
                raise UserError(f"the experiment's division has no client {unknown[0]!r}")
        else:
            rank = self._settings.rank or experiment.method.rank
            problem = Problem.of_client(experiment, self._settings.clients[0], self._settings.data, rank, hello.labels)
        if list(problem.corpus.labels) != hello.labels:
            raise UserError(f"the labels here are {list(problem.corpus.labels)}, the server's {hello.labels}")
        bench = Bench.make(experiment, problem).on_all_devices()
        members = [who for who in problem.members if who.id in self._settings.clients]
        base = fingerprint(bench.adapted.model)
        folder = RunFolder(path)
        simulation = Simulation(bench.method, bench.adapted.spec, members, folder, bench.trainer, experiment.seed)
        work = _Work(bench, folder, simulation, base)
        for index in folder.folds():
            bench.trainer.fold(folder.fold(index))
            work.folded.append(index)
        return work

    def _done(self, work: _Work, order: Order, payloads: Sequence[bytes]) -> tuple[Done, list[bytes]]:
        """All that the order asks, its clients together; where that fails one by one, so that one's failure is its own."""
        found: dict[str, _Result] = {}
        sent: dict[ClientInfo, Tensors] = {}
        for errand in order.errands:
            with _caught(errand.who.id, found):
                who = errand.who.info()
                if who not in work.simulation.members:
                    raise ValueError(f"this node has no client {who.id!r} of rank {who.rank} with {who.examples} examples")
                if errand.folds is not None:
                    self._fold(work, payloads[errand.folds])
                sent[who] = decode(payloads[errand.got])
        with suppress(*_FAILURES):
            found.update(self._together(work, order, sent))
        for who in sent:
            if who.id not in found:
                with _caught(who.id, found):
                    found.update(self._together(work, order, {who: sent[who]}))
        answers: list[Answer] = []
        uploads: list[bytes] = []
        for errand in order.errands:
            answer, upload = found[errand.who.id]
            if upload is not None:
                answer = answer.model_copy(update={"upload": len(uploads)})
                uploads.append(upload)
            answers.append(answer)
        return Done(when=order.when, folds=work.folded, answers=answers), uploads

    def _together(self, work: _Work, order: Order, sent: Mapping[ClientInfo, Tensors]) -> Iterator[tuple[str, _Result]]:
        """The clients' names and results, as each group of them finishes."""
        rnd = order.when.round()
        if order.kind == "keep":
            for who, got in sent.items():
                view = with_folds(work.simulation.view(who, got, rnd), [work.folder.fold(i) for i in work.folded])
                work.bench.write({who.id: view}, work.folder.path / "adapter", "adapter")
                yield who.id, (Answer(id=who.id), None)
        elif order.kind == "judge":
            for who, score in work.simulation.judge(rnd, sent, {}):
                answer = Answer(id=who.id)
                if score is not None:
                    answer = Answer(id=who.id, examples=score.examples, metrics=dict(score.metrics))
                yield who.id, (answer, None)
        else:
            for reply in work.simulation.turn(rnd, sent, {}):
                answer = Answer(id=reply.client.id, weight=reply.weight, notes=dict(reply.notes))
                yield reply.client.id, (answer, encode(reply.upload))

    def _fold(self, work: _Work, payload: bytes) -> None:
        """Applies the folds that the model lacks, each once: on disk first, so that a crash loses none."""
        for index, change in caught_up(decode(payload), work.bench.adapted.spec).items():
            if index in work.folded:
                continue
            if work.folded and index < work.folded[-1]:
                raise ValueError(f"the fold of round {index + 1} came after that of round {work.folded[-1] + 1}")
            work.folder.save_fold(index, change)
            work.simulation.fold(change)
            work.folded.append(index)

    def _run_folder(self, run: str) -> Path:
        return self._folder / "runs" / client_folder(run)


def _hello(folder: Path) -> Hello:
    return Hello.model_validate_json((folder / "hello").read_bytes())


def fingerprint(model: nn.Module) -> str:
    """A digest of a model's names, shapes, dtypes and values, as they are before anything is folded."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(json.dumps([name, list(value.shape), str(value.dtype)]).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _caught(client: str, found: dict[str, _Result]) -> Iterator[None]:
    """A failure in here is the client's answer."""
    try:
        yield
    except _FAILURES as error:
        found[client] = Answer(id=client, error=_line(error)), None


def _line(error: BaseException) -> str:
    """The error in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, UserError | RunStopped | ValueError) else f"{type(error).__name__}: {text}"
