"""A run in its folder: beginning, remaining rounds and end, with any backend."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError

from fedlora.adapter import Adapter
from fedlora.config.experiment import Experiment
from fedlora.errors import RunStopped
from fedlora.federated_data import FederatedData
from fedlora.models.fingerprint import fingerprint
from fedlora.rounds.durable import replacing
from fedlora.rounds.loop import Backend, Plan, RunState, run_rounds
from fedlora.rounds.progress import Progress
from fedlora.runs.folder import RunFolder
from fedlora.runs.manifest import Manifest
from fedlora.runs.start import keep_rounds, record
from fedlora.session import Session


def require_same(folder: RunFolder, experiment: Experiment, federated_data: FederatedData) -> None:
    """Checks that the run is new, or that data and model are those with which it began.

    Raises:
        UserError: they differ; names the difference.
    """
    if (manifest := Manifest.find(folder.path)) is not None:
        manifest.require_data(federated_data.fingerprint)
        manifest.require_model(experiment.model, fingerprint(experiment.model))


def begin(session: Session, folder: RunFolder) -> Manifest:
    """Returns the manifest of the run; for a new run, writes it and the state before the first round.

    Raises:
        UserError: the run is not new, and its model is adapted in different modules.
    """
    experiment = session.experiment
    if (manifest := Manifest.find(folder.path)) is not None:
        manifest.require_modules(session.places)
        if manifest.experiment["rounds"] != experiment.rounds:
            keep_rounds(folder, experiment)
        return manifest
    folder.restore()  # raises if the folder has lost its manifest
    path = {"clients_per_step": session.trainer.clients_per_step, "tokens_in_a_pass": session.trainer.tokens}
    packing = session.adapted.packing
    environment = record(
        folder, experiment, **path, packed=packing.works, last_block_narrowed=packing.narrows, notes=list(session.notes)
    )
    manifest = Manifest(
        id=uuid4().hex,
        experiment=experiment.model_dump(mode="json"),
        data=session.federated_data.fingerprint,
        model=fingerprint(experiment.model),
        modules=session.places,
        environment=environment,
    )
    folder.begin(manifest.model_dump(), RunState(session.method.init_server(session.adapted.spec, experiment.seed)))
    return manifest


def rounds(session: Session, folder: RunFolder, progress: Progress, backend: Backend) -> RunState:
    """Runs the remaining rounds of the folder on the backend; returns the server's state after the last.

    Raises:
        UserError: the folder cannot be read.
        RunStopped: the run cannot continue; all complete rounds are in the folder.
    """
    experiment = session.experiment
    for note in session.notes:
        progress.notify(note)
    begin(session, folder)
    run_state: RunState
    done, run_state = folder.restore()
    method, spec = session.method, session.adapted.spec
    plan = Plan(
        method,
        spec,
        experiment.seed,
        experiment.sampling,
        experiment.evaluate,
        experiment.rounds,
        experiment.method.uniform,
        None if experiment.method.row.personal or not len(session.trainer.test) else session.trainer.evaluate,
    )
    for index in run_state.base_updates.rounds:
        session.trainer.merge_into_base(folder.base_update(index))
    for after, row in run_rounds(plan, backend, folder, run_state, done, progress):
        folder.commit(row["round"], after, row)
        run_state = after
    return run_state


def finish(session: Session, adapters: Mapping[str, Adapter], folder: RunFolder) -> Mapping[str, Path]:
    """Writes the final adapters of a run, replacing those of an earlier end; returns their folders.

    Raises:
        RunStopped: they cannot be written.
    """
    folder.require()
    out = folder.path / "adapter"
    if not adapters:
        return {}
    try:
        with replacing(out) as partial:
            written = session.write(adapters, partial, "adapter", folder.rows())
            shutil.rmtree(out, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunStopped(f"cannot write {out}: {reason}; all rounds are complete") from error
    return {name: out / found.relative_to(partial) for name, found in written.items()}
