"""One run on the server: the rounds of a run directory with the clients of a transport. Independent of the network."""

from dataclasses import replace
from pathlib import Path
from uuid import uuid4

from fedlora.deploy.admission import NodeAdmission
from fedlora.deploy.backend import FlowerBackend
from fedlora.deploy.event_log import EventLog
from fedlora.deploy.scores import ScoreCheck
from fedlora.deploy.transport import Transport
from fedlora.deploy.wire import PROTOCOL, Handshake
from fedlora.errors import RunStopped, UserError
from fedlora.federated_data import FederatedData
from fedlora.lifecycle import Start, begin, final_adapters, finish, require_same, rounds
from fedlora.messages import Round
from fedlora.models.weights_digest import weights_digest
from fedlora.rounds.base_updates import pending_base_updates
from fedlora.rounds.plan import RunState
from fedlora.runs.folder import RunFolder
from fedlora.runs.start import read_folder, resolve_settings
from fedlora.session import Session
from fedlora.version import __version__

_MAX_TENSORS, _MAX_TENSORS_PER_MODULE = 1024, 64
"""Limits of an upload, above those of any method."""
_LOCK_SECONDS = 60.0
"""Seconds to wait for an earlier server of this run to release the folder after its SuperLink was killed."""


def serve(path: Path, transport: Transport) -> None:
    """Runs the remaining rounds of the folder, and writes the adapter; reports the end to the event log and the nodes.

    The adapters of a personal method belong to the clients, and are written to the folders of their nodes.

    Raises:
        UserError: the folder, the data or the model cannot be used.
        RunStopped: the run cannot continue, for example because of too few clients.
    """
    event_log = EventLog(path)
    try:
        experiment = resolve_settings(read_folder(path))
        if experiment.method.row.personal and experiment.evaluate.stop_after is not None:
            raise UserError(
                f"evaluate.stop_after is not supported in a deployment of {experiment.method.name}: each node has the "
                "adapters of its clients after the last round only"
            )
        folder = RunFolder(path, _LOCK_SECONDS)
        try:
            federated_data = FederatedData.of_server(experiment)
            require_same(folder, experiment, federated_data)
            session = Session.make(experiment, federated_data)
            start = begin(session, folder)
            backend = flower_backend(session, start, transport, event_log)
            backend.wait_for_clients(experiment.clients.size or 1, experiment.deploy.wait)
            limited = experiment.privacy.largest_cohort is not None  # in an account for this number of clients
            registered = experiment.clients.size if limited else len(backend.clients())
            session = replace(session, deployed=True, registered=registered)
            run_state = rounds(session, folder, event_log, backend, start, deployed=True)
            if experiment.method.row.personal:
                _save_adapters(session, folder, backend, run_state)
            else:
                _, left_out = finish(session, final_adapters(session, folder, run_state), folder)
                if left_out:
                    event_log.notify(f"PEFT adapters: {left_out}")
            backend.finish()
        finally:
            folder.release()
    except UserError as error:
        event_log.ended("unusable", str(error))
        raise
    except RunStopped as error:
        event_log.ended("stopped", str(error))
        raise
    except BaseException as error:
        event_log.ended("stopped", f"{type(error).__name__}: {error}")
        raise
    event_log.ended("done")


def flower_backend(session: Session, start: Start, transport: Transport, event_log: EventLog) -> FlowerBackend:
    """Backend for the rounds after `start`."""
    experiment = session.experiment
    handshake = Handshake(
        protocol=PROTOCOL,
        version=__version__,
        run=start.manifest.id,
        experiment=experiment.to_toml(),
        labels=list(session.federated_data.labelled_data.labels),
        server_session_id=uuid4().hex,
        done=start.done,
    )
    mixed_ranks = experiment.method.row.mixed_ranks
    if experiment.privacy.unit == "client":  # which was checked for these ranks only
        mixed_ranks = mixed_ranks and experiment.clients.ranks is not None
    admission = NodeAdmission(weights_digest(session.adapted.model), experiment.method.rank, mixed_ranks)
    empty = session.task.no_statistics(session.federated_data.labelled_data.labels)
    scores = ScoreCheck(empty, session.task.check, experiment.clients.held_out)
    spec, settings = session.adapted.spec, experiment.deploy
    max_tensors = _MAX_TENSORS + _MAX_TENSORS_PER_MODULE * (len(spec.modules) + len(spec.head))
    return FlowerBackend(
        transport,
        handshake,
        admission,
        session.trainer,
        scores,
        settings.deadline,
        settings.poll,
        event_log.notify,
        max_tensors,
    )


def _save_adapters(session: Session, folder: RunFolder, backend: FlowerBackend, after: RunState) -> None:
    clients, rnd = backend.clients(), Round(session.experiment.rounds, session.experiment.seed)
    sent = {client: session.method.send(after.server, client, rnd) for client in clients}
    backend.save_adapters(
        rnd, sent, pending_base_updates(session.adapted.spec, folder, after.base_updates.known(backend.held()), clients)
    )
