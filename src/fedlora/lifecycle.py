"""A run in its folder: beginning, remaining rounds and end, with any backend."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError

from fedlora.adapter import Adapter
from fedlora.config.experiment import Experiment
from fedlora.errors import RunStopped
from fedlora.exporting.write import unfit_for_peft
from fedlora.federated_data import FederatedData
from fedlora.generation_setup import generation_notes
from fedlora.loaded_model import model_key
from fedlora.messages import ClientInfo
from fedlora.models.fingerprint import fingerprint
from fedlora.privacy.client_level import planned
from fedlora.rounds.backend import Backend
from fedlora.rounds.durable import replacing
from fedlora.rounds.early_stopping import best_round, stops, until_best
from fedlora.rounds.loop import run_rounds
from fedlora.rounds.plan import GlobalEvaluator, Plan, RecordLevel, RunState
from fedlora.rounds.progress import Progress
from fedlora.run_exports import write_exports
from fedlora.runs.folder import ADAPTER, RunFolder
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


@dataclass(frozen=True)
class Start:
    """Start of the remaining rounds: the run's manifest, its complete rounds, and the server's state after them."""

    manifest: Manifest
    done: int
    run_state: RunState


def begin(session: Session, folder: RunFolder) -> Start:
    """Restores the run from its folder; for a new run, first writes the manifest and the state before the first round.

    Raises:
        UserError: a file is missing or damaged, or the run's model was adapted in different modules.
    """
    manifest = _manifest(session, folder)
    done, run_state = folder.restore()
    return Start(manifest, done, run_state)


def _manifest(session: Session, folder: RunFolder) -> Manifest:
    experiment = session.experiment
    if (manifest := Manifest.find(folder.path)) is not None:
        manifest.require_modules(session.places)
        if manifest.experiment["rounds"] != experiment.rounds:
            keep_rounds(folder, experiment)
        return manifest
    folder.restore()  # raises if the folder has lost its manifest
    path = {"clients_per_step": session.trainer.clients_per_step, "max_tokens": session.trainer.max_tokens}
    packing = session.adapted.packing
    environment = record(
        folder,
        experiment,
        **path,
        packed=packing.works,
        skips_unused_activations=packing.narrows,
        notes=_notes(session),
    )
    encoded = zip(session.clients, session.federated_data.clients, strict=True)
    manifest = Manifest(
        id=uuid4().hex,
        experiment=experiment.model_dump(mode="json"),
        data=session.federated_data.fingerprint,
        model=session.reuse.get(
            "fingerprint",
            model_key(experiment, session.federated_data.labelled_data.labels),
            lambda: fingerprint(experiment.model),
        ),
        modules=session.places,
        environment=environment,
        trained={new.id: new.examples for new, old in encoded if new.examples != old.examples},
    )
    folder.begin(manifest.model_dump(), RunState(session.method.init_server(session.adapted.spec, experiment.seed)))
    return manifest


def _notes(session: Session) -> list[str]:
    """Those of the session, and of the evaluation on the test set, which a client does not make."""
    return [*session.notes, *generation_notes(session.experiment, session.trainer.test)]


def rounds(
    session: Session, folder: RunFolder, progress: Progress, backend: Backend, start: Start, deployed: bool = False
) -> RunState:
    """Runs the rounds after `start` on the backend; returns the server's state after the last.

    With `evaluate.stop_after`, the adapters of the best round are stored, and rounds without improvement end the run. In a
    deployment, uploads are compared with each other unless `sampling.check_cohort` is false or there is privacy, and the
    randomness of client-level privacy is secret.

    Raises:
        RunStopped: the run cannot continue; all complete rounds are in the folder.
    """
    experiment = session.experiment
    checked, privacy = experiment.sampling.check_cohort, experiment.privacy
    client_level = None
    if privacy.unit == "client":
        rate, clients = experiment.sampling.fraction, session.registered or len(backend.clients())
        client_level = planned(privacy, rate, experiment.rounds, clients, secret=deployed)
    for note in _notes(session):
        progress.notify(note)
    run_state = start.run_state
    method, spec = session.method, session.adapted.spec
    plan = Plan(
        method,
        spec,
        experiment.seed,
        experiment.sampling,
        experiment.evaluate,
        experiment.rounds,
        experiment.method.uniform or privacy.hides_counts,
        None if experiment.method.row.personal or not len(session.trainer.test) else _evaluator(session, folder),
        (deployed and privacy.unit == "none") if checked is None else checked,
        folder.path / "spool",
        metrics=session.task.metrics,
        lower_is_better=session.task.lower_is_better,
        hides_training=privacy.unit != "none",
        client_level=client_level,
        record_level=None if privacy.unit != "record" or deployed else _record_level(session, folder),
    )
    for index in run_state.base_updates.rounds:
        session.trainer.merge_into_base(folder.base_update(index))
    rows = folder.rows()
    evaluate_before = experiment.evaluate.before and not rows
    if stops(rows, experiment.evaluate.stop_after):
        return run_state
    for after, row in run_rounds(plan, backend, folder, run_state, start.done, progress, evaluate_before):
        if experiment.evaluate.stop_after is not None:
            best = best_round([*rows, row], experiment.evaluate.metric, session.task.lower_is_better)
            row = replace(row, best_round=best)
            if row.best_round == row.round:
                folder.save_best(row.round, session.adapters(after, folder, row.round))
        folder.commit(row.round, after, row)
        run_state = after
        rows.append(row)
        if stops(rows, experiment.evaluate.stop_after):
            progress.notify(
                f"stopped after round {row.round}: no improvement of {experiment.evaluate.metric} in "
                f"evaluate.stop_after = {experiment.evaluate.stop_after} evaluations; the best round is {row.best_round}"
            )
            break
    return run_state


def _record_level(session: Session, folder: RunFolder) -> RecordLevel:
    """The privacy of the clients' examples in a simulation; in a deployment, each node has its own account."""
    from fedlora.privacy.account import epsilon  # takes seconds to import

    privacy = session.experiment.privacy
    delta = privacy.delta
    assert delta is not None
    of_ledger = cache(lambda ledger: epsilon(ledger, delta))

    def spent(client: ClientInfo, done: int) -> float:
        found: float = of_ledger(tuple(session.spent(client, folder, done)))
        return found

    return RecordLevel(privacy.clip, delta, spent)


def final_adapters(session: Session, folder: RunFolder, run_state: RunState) -> Mapping[str, Adapter]:
    """The adapters to export, named as by `Session.adapters`: those of the best round, if stored, else of the last.

    Raises:
        UserError: the stored adapters are missing or damaged.
    """
    rows = folder.rows()
    return folder.best() or session.adapters(run_state, folder, rows[-1].round if rows else 0)


def _evaluator(session: Session, folder: RunFolder) -> GlobalEvaluator:
    """Evaluates on the test set; generated answers are stored in the run's folder."""

    def evaluate(adapter: Adapter, rounds: int) -> Mapping[str, int | float]:
        found = session.trainer.evaluate(adapter)
        if (generation := session.generation) is None:
            return found
        answers = generation.answers(session.adapted, adapter)
        folder.save_samples(rounds, generation.samples(answers))
        return {**found, **generation.scores(answers)}

    return evaluate


def finish(session: Session, adapters: Mapping[str, Adapter], folder: RunFolder) -> tuple[Mapping[str, Path], str]:
    """Writes the final adapters of a run, replacing earlier ones; returns their folders, and why others are missing.

    Raises:
        RunStopped: they cannot be written.
    """
    folder.require()
    out = folder.path / ADAPTER
    unfit = {name: unfit_for_peft(adapter, session.adapted) for name, adapter in adapters.items()}
    reasons = [reason for reason in unfit.values() if reason]
    left_out = f"{len(reasons)} of {len(adapters)} not written: {reasons[0]}" if reasons else ""
    able = {name: adapter for name, adapter in adapters.items() if not unfit[name]}
    if not able:
        return {}, left_out
    try:
        with replacing(out) as partial:
            written = write_exports(session, able, partial, "adapter", until_best(folder.rows()))
            shutil.rmtree(out, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise RunStopped(f"cannot write {out}: {why}; all rounds are complete") from error
    return {name: out / found.relative_to(partial) for name, found in written.items()}, left_out
