"""Execution of an experiment: partitioning, model loading, rounds, export of adapters."""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import torch
from safetensors import SafetensorError

from fedlora.adapter import Adapter, Dense, Scaling, lora_init
from fedlora.config.experiment import Experiment
from fedlora.data.memory import MEMORY
from fedlora.errors import RunStopped, UserError
from fedlora.exporting.card import model_card
from fedlora.exporting.write import fixed, to_merged, to_peft, unfit
from fedlora.federated_data import FederatedData
from fedlora.linalg.combine import stack
from fedlora.linalg.fit import recompress
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Round
from fedlora.method import AnyMethod
from fedlora.methods.wrap.head import with_head
from fedlora.models import model_copy
from fedlora.models.adapted import AdaptedModel
from fedlora.models.fingerprint import fingerprint
from fedlora.models.loading import locate, quiet
from fedlora.models.targets import check_ranks, find_targets, head_modules, norm_modules
from fedlora.models.tokenizers import check_known, check_lengths, positions
from fedlora.rounds.durable import replacing
from fedlora.rounds.loop import Backend, Plan, RunState, run_rounds
from fedlora.rounds.progress import Progress
from fedlora.rounds.simulate import SimulationBackend
from fedlora.runs.folder import DEPLOY, RunFolder, client_folder
from fedlora.runs.manifest import Manifest
from fedlora.runs.result import Result
from fedlora.runs.start import extend, keep_rounds, new_folder, read_folder, record, settled
from fedlora.tasks.classification import Classification, Encoded, Task
from fedlora.terminal import shown
from fedlora.train import hardware
from fedlora.train.batched import bytes_per_token
from fedlora.train.devices import MultiDeviceTrainer, TrainerProcess
from fedlora.train.features import try_packing
from fedlora.train.independence import safe_clients_per_step
from fedlora.train.local import LocalTrainer


def run(
    experiment: Experiment | None = None,
    out: str | Path | None = None,
    progress: bool | Progress = True,
    *,
    data: Any = None,
    model: Any = None,
    tokenizer: Any = None,
) -> Result:
    """Runs an experiment from its first round to its exported adapters.

    Args:
        experiment: the settings; by default `Experiment()`.
        out: a new folder for the run; by default in `runs/`.
        progress: whether to show progress if standard output is a terminal or a notebook; or your own callbacks.
        data: rows in place of `data.source`: a list of mappings, a `datasets.Dataset`, a `pandas.DataFrame`, or a mapping
            of the splits `train` and `test` to one of these, such as a `DatasetDict`. The run keeps only their fingerprint.
        model: a `transformers.PreTrainedModel` in place of the setting `model`. A copy is saved in the run's folder.
        tokenizer: the tokenizer of `model`.

    Raises:
        UserError: the experiment, the data, the model or the folder is invalid; nothing was trained.
        RunStopped: the run cannot continue; `resume` continues it after its last complete round.
    """
    experiment = settled(experiment or Experiment())
    if data is not None:
        source = experiment.data.model_copy(update={"source": MEMORY})
        experiment = experiment.model_copy(update={"data": source})
    folder = RunFolder.create(Path(out) if out is not None else new_folder(experiment))
    saved_model = folder.path / "model"
    try:
        if model is not None or tokenizer is not None:
            experiment = experiment.model_copy(update={"model": model_copy.save(model, tokenizer, saved_model)})
        with shown(experiment.rounds, progress) as callbacks:
            return _run(experiment, folder, callbacks, data)
    finally:
        if not folder.experiment.exists():
            shutil.rmtree(saved_model, ignore_errors=True)
        folder.release()


def resume(
    path: str | Path, progress: bool | Progress = True, overrides: Iterable[str] = (), *, data: Any = None
) -> Result:
    """Resumes a run after its last complete round; the result is identical to that of an uninterrupted run.

    Args:
        path: the run's folder.
        progress: as in `run`.
        overrides: more rounds, as in `["rounds=20"]`; no other setting may change.
        data: the rows passed to `run`, if any, in the same order.

    Raises:
        UserError: not a run directory, locked by another process, a damaged file, or settings, data or model that differ
            from those with which the run began.
        RunStopped: the run cannot continue.
    """
    if overrides:
        extend(Path(path), overrides)
    with _opened(Path(path)) as (folder, experiment), shown(experiment.rounds, progress) as callbacks:
        return _run(experiment, folder, callbacks, data)


def export(
    path: str | Path, to: Literal["adapter", "merged"], out: str | Path, client: str | None = None
) -> Mapping[str, Path]:
    """Writes a run's current adapter, as a PEFT folder or merged into the model; returns the folders.

    For a personal method, each client's adapter, or only that of `client`, is written to a separate folder. The data are
    not read: labels and clients are taken from the run directory.

    Raises:
        UserError: no such run or client, no complete round yet, a damaged file of the run, a different model, `out` in use,
            `to` is merged without a client for a personal method, or the adapter depends on the input.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is not empty; choose another directory")
    with _opened(Path(path)) as (folder, experiment):
        done, run_state = folder.restore()
        manifest = Manifest.find(folder.path)
        if not done or manifest is None:
            raise UserError(f"{path}: has no complete round yet; there is nothing to export")
        if experiment.method.row.personal and (folder.path / DEPLOY).exists():
            raise UserError(f"{path}: every client's own adapter is in its node's folder, in runs/*/adapter")
        manifest.require_model(experiment.model, fingerprint(experiment.model))
        session = Session.make(
            experiment, FederatedData.without_examples(manifest.data.labels, manifest.data.client_infos())
        )
        manifest.require_modules(session.places)
        adapters = session.adapters(run_state, folder, done)
        if client is not None:
            if client not in adapters:
                raise UserError(f"{client!r}: no such client with an adapter of its own; there are {_some(adapters)}")
            adapters = {"": adapters[client]}
        if to == "merged" and len(adapters) > 1:
            raise UserError(f"{experiment.method.name} has an adapter for each client: choose one with --client")
        try:
            with replacing(out) as partial:
                written = session.write(adapters, partial, to, folder.rows())
        except (OSError, SafetensorError) as error:
            raise UserError(f"{out}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
        return {name: out / found.relative_to(partial) for name, found in written.items()}


def check(experiment: Experiment, federated_data: FederatedData) -> None:
    """Checks everything that `Session.make` checks, without reading the model's weights.

    Raises:
        UserError: invalid model, tokenizer, targets, ranks or device.
    """
    quiet()
    hardware.devices(experiment.train.device, experiment.train.devices)
    task = Classification()
    model, tokenizer = task.outline(experiment.model, federated_data.labelled_data.labels)
    lora = experiment.lora
    check_ranks(*find_targets(model, lora.targets, lora.rank_pattern, head_modules(model, ())), experiment.method.rank)
    encoded(task, model, tokenizer, federated_data, experiment.train.max_length)


def encoded(
    task: Task, model: Any, tokenizer: Any, federated_data: FederatedData, max_length: int
) -> tuple[Encoded, Encoded]:
    """Tokenizes the training and the test examples for the model.

    Raises:
        UserError: they are too long for the model, or the tokenizer has none of their words in its vocabulary.
    """
    train, test = (
        task.encode(tokenizer, rows[:], max_length)
        for rows in (federated_data.labelled_data.train, federated_data.labelled_data.test)
    )
    for examples in (train, test):
        check_lengths(examples.lengths(), max_length, positions(model))
    check_known(train.features, tokenizer)
    return train, test


@dataclass(frozen=True)
class Session:
    """In-memory components of a run, on a server or on a client."""

    experiment: Experiment
    federated_data: FederatedData
    adapted: AdaptedModel
    trainer: LocalTrainer | MultiDeviceTrainer
    method: AnyMethod
    tokenizer: Any
    notes: Sequence[str] = ()
    """Messages for the user before the first round."""

    @classmethod
    def make(cls, experiment: Experiment, federated_data: FederatedData) -> "Session":
        """Loads the model and tokenizes the examples. The session's experiment has the batch order resolved from `auto`.

        Raises:
            UserError: invalid model or device, or a model that cannot be trained.
        """
        task, settings = Classification(), experiment.train
        quiet()
        device = hardware.device(settings.device)
        model, tokenizer, checkpoint = task.load(experiment.model, federated_data.labelled_data.labels, experiment.seed)
        model.to(device)
        head = head_modules(model, checkpoint.new)
        examples, test = encoded(task, model, tokenizer, federated_data, settings.max_length)
        adapted = AdaptedModel(
            model,
            Scaling(experiment.lora.alpha, experiment.lora.rslora),
            experiment.lora.targets,
            experiment.lora.dropout,
            experiment.lora.rank_pattern,
            head + (norm_modules(model, head) if experiment.method.with_norms else ()),
            torch.bfloat16 if settings.precision == "bf16" else torch.float32,
        )
        check_ranks(adapted.spec.modules, adapted.spec.rank_pattern, experiment.method.rank)
        if settings.packed:
            try_packing(adapted, task, tokenizer, min(settings.max_length, positions(model) or settings.max_length))
        clients_per_step = safe_clients_per_step(adapted, task, tokenizer, settings.clients_per_step, settings.max_length)
        if settings.batches == "auto":
            settings = settings.model_copy(update={"batches": "random" if adapted.packing.works else "by-length"})
            experiment = experiment.model_copy(update={"train": settings})
        kept = bytes_per_token(adapted, task, examples, lora_init(adapted.spec, experiment.method.rank, experiment.seed))
        trainer = LocalTrainer(
            adapted,
            task,
            examples,
            {share.client: torch.as_tensor(share.train) for share in federated_data.partition.shares},
            {share.client: torch.as_tensor(share.held_out) for share in federated_data.partition.shares},
            test,
            settings,
            experiment.evaluate.batch_size,
            clients_per_step,
            settings.activation_memory_mb * 1_000_000 // kept,
        )
        method = with_head(experiment.method.make(), experiment.method.head or experiment.method.row.head)
        notes = [
            *([slow] if (slow := hardware.slow_precision(settings.precision, settings.device)) else []),
            *checkpoint.notes,
        ]
        if clients_per_step < settings.clients_per_step:
            notes.append(
                "clients are trained one at a time: together, they would not get what each gets alone in this model"
            )
        return cls(experiment, federated_data, adapted, trainer, method, tokenizer, notes)

    @property
    def places(self) -> list[str]:
        """Names of the adapted modules and of the fully trained parameters."""
        return sorted([*self.adapted.spec.modules, *self.adapted.spec.head])

    def on_all_devices(self) -> "Session":
        """Returns the session with one process per device in `train.devices` after the first.

        Raises:
            UserError: fewer devices are available.
        """
        assert isinstance(self.trainer, LocalTrainer)
        count = hardware.devices(self.experiment.train.device, self.experiment.train.devices)
        if count == 1:
            return self
        if hardware.device(self.experiment.train.device).type == "cuda":
            names, threads = [f"cuda:{i}" for i in range(1, count)], torch.get_num_threads()
        else:
            names, threads = ["cpu"] * (count - 1), max(1, torch.get_num_threads() // count)
        torch.set_num_threads(threads)
        helpers = [TrainerProcess(name, _trainer, self.experiment, self.federated_data, name, threads) for name in names]
        return replace(self, trainer=MultiDeviceTrainer(self.trainer, helpers))

    def adapters(self, run_state: RunState, folder: RunFolder, done: int) -> dict[str, Adapter]:
        """Global adapter under the empty name, or each client's adapter under its id, after `done` rounds.

        They include base updates, and so all changes to the model since it was loaded.
        """
        simulation, rnd = self.simulation(folder), Round(done, self.experiment.seed)
        clients = (
            self.federated_data.clients if self.experiment.method.row.personal else [ClientInfo("", self.method.rank, 1)]
        )
        views = {one.id: simulation.view(one, self.method.send(run_state.server, one, rnd), rnd) for one in clients}
        base_updates = [folder.base_update(index) for index in run_state.base_updates.rounds]
        return {name: with_base_updates(view, base_updates) for name, view in views.items()} if base_updates else views

    def simulation(self, folder: RunFolder) -> SimulationBackend:
        """Simulation backend that stores the clients' states in the run's folder."""
        return SimulationBackend(
            self.method, self.adapted.spec, self.federated_data.clients, folder, self.trainer, self.experiment.seed
        )

    def write(
        self,
        adapters: Mapping[str, Adapter],
        out: Path,
        to: Literal["adapter", "merged"],
        rows: Sequence[Mapping[str, Any]] = (),
    ) -> dict[str, Path]:
        """Writes each adapter to `out`, or to a folder in `out` named by its client; returns the folders.

        `rows` are the rows of the round log, for the adapter's model card.

        Raises:
            UserError: an adapter cannot be represented in the format; nothing was written.
        """
        for name, adapter in adapters.items():
            if reason := unfit(adapter):
                raise UserError(f"the adapter{f' of client {name!r}' if name else ''} cannot be exported: {reason}")
        labels, dropout = self.federated_data.labelled_data.labels, self.experiment.lora.dropout
        base = locate(self.experiment.model)
        if Path(base).is_dir():
            base = str(Path(base).resolve())
        folders = {name: out / client_folder(name) if name else out for name in adapters}
        for name, adapter in adapters.items():
            if to == "adapter":
                to_peft(adapter, folders[name], dropout, base, self.adapted, labels, self.tokenizer)
                pad = self.tokenizer.pad_token_id
                card = model_card(self.experiment, base, pad, labels, rows)
                (folders[name] / "README.md").write_text(card, encoding="utf-8")
            else:
                model, tokenizer, checkpoint = Classification().load(self.experiment.model, labels, self.experiment.seed)
                to_merged(adapter, folders[name], model, tokenizer, checkpoint.dtype)
        return folders


def _run(experiment: Experiment, folder: RunFolder, progress: Progress, in_memory: Any) -> Result:
    federated_data = FederatedData.make(experiment, in_memory)
    require_same(folder, experiment, federated_data)
    session = Session.make(experiment, federated_data).on_all_devices()
    run_state = rounds(session, folder, progress, session.simulation(folder))
    adapters = session.adapters(run_state, folder, experiment.rounds)
    reasons = [reason for adapter in adapters.values() if (reason := unfit(adapter))]
    left_out = f"{len(reasons)} of {len(adapters)} not written: {reasons[0]}" if reasons else ""
    able = {name: adapter for name, adapter in adapters.items() if not unfit(adapter)}
    written = finish(session, able, folder)
    return Result(folder.path, experiment.method.name, folder.rows(), written, left_out)


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


@contextmanager
def _opened(path: Path) -> Iterator[tuple[RunFolder, Experiment]]:
    """Locks and returns the folder of an earlier run, with its experiment."""
    experiment = read_folder(path)
    folder = RunFolder(path)
    try:
        yield folder, experiment
    finally:
        folder.release()


def with_base_updates(view: Adapter, base_updates: Sequence[Mapping[str, LowRank]]) -> Adapter:
    """Combines the adapter and the base updates in one adapter, of the numerical rank of their sum."""
    return {
        name: part
        if isinstance(part, Dense) or not any(name in base_update for base_update in base_updates)
        else recompress(
            stack([(1.0, one) for one in (fixed(part).as_two_factors(), *(f[name] for f in base_updates if name in f))])
        )
        for name, part in view.items()
    }


def _trainer(experiment: Experiment, federated_data: FederatedData, device: str, threads: int) -> LocalTrainer:
    torch.set_num_threads(threads)
    train = experiment.train.model_copy(update={"device": device})
    trainer = Session.make(experiment.model_copy(update={"train": train}), federated_data).trainer
    assert isinstance(trainer, LocalTrainer)
    return trainer


def _some(names: Mapping[str, Any]) -> str:
    first = [name or "the global one" for name in list(names)[:5]]
    return ", ".join(first) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
