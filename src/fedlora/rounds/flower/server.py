"""One run on the server: the rounds of a folder with the clients of a post. Knows no network."""

from pathlib import Path
from uuid import uuid4

from fedlora.errors import RunStopped, UserError
from fedlora.experiment import Session, begin, finish, require_same, rounds
from fedlora.messages import Round
from fedlora.problem import FederatedData
from fedlora.rounds.checkpoint import RunFolder
from fedlora.rounds.flower.door import NodeAdmission
from fedlora.rounds.flower.exchange import FlowerBackend, Transport
from fedlora.rounds.flower.journal import Journal
from fedlora.rounds.flower.node import fingerprint
from fedlora.rounds.flower.scores import ScoreCheck
from fedlora.rounds.flower.wire import PROTOCOL, Handshake
from fedlora.rounds.loop import RunState, missed
from fedlora.runs import read_folder, settled
from fedlora.train.tasks import Classification
from fedlora.version import __version__

_TENSORS, _TENSORS_PER_MODULE = 1024, 64
"""Above what any method uploads."""
_LET_GO_SECONDS = 60.0
"""An earlier server of this run, whose SuperLink was killed, needs a moment to notice."""


def serve(path: Path, post: Transport) -> None:
    """Runs the rounds that the folder lacks, and writes the adapter; tells its journal and the nodes how it ended.

    A personal method's adapters are the clients' own: they are written to the folders of their nodes.

    Raises:
        UserError: the folder, the data or the model cannot be used.
        RunStopped: the run cannot go on, because of too few clients, for instance.
    """
    journal = Journal(path)
    try:
        experiment = settled(read_folder(path))
        folder = RunFolder(path, _LET_GO_SECONDS)
        try:
            problem = FederatedData.of_server(experiment)
            require_same(folder, experiment, problem)
            bench = Session.make(experiment, problem)
            exchange = remote(bench, folder, post, journal)
            exchange.gather(experiment.clients.size or 1, experiment.deploy.wait)
            progress = rounds(bench, folder, journal, exchange)
            if experiment.method.row.personal:
                _keep(bench, folder, exchange, progress)
            else:
                finish(bench, bench.adapters(progress, folder, experiment.rounds), folder)
            exchange.finish()
        finally:
            folder.release()
    except UserError as error:
        journal.ended("unusable", str(error))
        raise
    except RunStopped as error:
        journal.ended("stopped", str(error))
        raise
    except BaseException as error:
        journal.ended("stopped", f"{type(error).__name__}: {error}")
        raise
    journal.ended("done")


def remote(bench: Session, folder: RunFolder, post: Transport, journal: Journal) -> FlowerBackend:
    """The exchange for the rounds that the folder lacks."""
    experiment = bench.experiment
    hello = Handshake(
        protocol=PROTOCOL,
        version=__version__,
        run=begin(bench, folder).id,
        experiment=experiment.to_toml(),
        labels=list(bench.problem.corpus.labels),
        life=uuid4().hex,
        done=folder.restore()[0],
    )
    door = NodeAdmission(fingerprint(bench.adapted.model), experiment.method.rank, experiment.method.row.mixed_ranks)
    scores = ScoreCheck(frozenset(Classification.metrics), experiment.clients.held_out)
    spec, settings = bench.adapted.spec, experiment.deploy
    tensors = _TENSORS + _TENSORS_PER_MODULE * (len(spec.modules) + len(spec.head))
    return FlowerBackend(
        post, hello, door, bench.trainer, scores, settings.deadline, settings.poll, journal.notify, tensors
    )


def _keep(bench: Session, folder: RunFolder, exchange: FlowerBackend, after: RunState) -> None:
    clients, rnd = exchange.clients(), Round(bench.experiment.rounds, bench.experiment.seed)
    sent = {who: bench.method.send(after.server, who, rnd) for who in clients}
    exchange.keep(rnd, sent, missed(bench.adapted.spec, folder, after.folds.known(exchange.held()), clients))
