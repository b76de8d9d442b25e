"""A run's components in memory: data, adapted model, trainer and method."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fedlora.adapter import Adapter, lora_init
from fedlora.composed_method import method_of
from fedlora.config.experiment import Experiment
from fedlora.encoded_data import EncodedData, Tokens, encode
from fedlora.exporting.base_updates import with_base_updates
from fedlora.federated_data import FederatedData
from fedlora.generation_setup import generation_notes, generation_of
from fedlora.initial_states import RememberedStates
from fedlora.loaded_model import LoadedModel
from fedlora.messages import ClientInfo, Round
from fedlora.method import AnyMethod
from fedlora.methods.wrap.magnitudes import with_magnitudes
from fedlora.models.adapted import AdaptedModel
from fedlora.models.checkpointing import checkpointed_blocks
from fedlora.models.in_place import other_parameters
from fedlora.models.loading import quiet
from fedlora.models.normalization import check_normalization
from fedlora.models.quantized import quantizable
from fedlora.models.targets import check_ranks, find_targets, head_modules
from fedlora.planning import weakness_notes
from fedlora.privacy.client_level import planned
from fedlora.privacy.events import Ledger
from fedlora.privacy.record import ledger
from fedlora.privacy.record_plan import client_privacy
from fedlora.privacy.release import leaving
from fedlora.reuse import Reuse
from fedlora.rounds.budgets import Budgets
from fedlora.rounds.plan import RunState
from fedlora.rounds.simulate import SimulationBackend
from fedlora.runs.folder import RunFolder
from fedlora.tasks.table import task_of
from fedlora.tasks.task import Task
from fedlora.train import hardware
from fedlora.train.devices import MultiDeviceTrainer, TrainerProcess
from fedlora.train.generation import Generation
from fedlora.train.local import LocalTrainer
from fedlora.train.micro_batches import bytes_per_token
from fedlora.train.schedule import schedule_notes


@dataclass(frozen=True)
class Session:
    """In-memory components of a run, on a server or on a client."""

    experiment: Experiment
    federated_data: FederatedData
    adapted: AdaptedModel
    trainer: LocalTrainer | MultiDeviceTrainer
    method: AnyMethod
    task: Task
    tokenizer: Any
    clients: Sequence[ClientInfo]
    """The clients, with the numbers of their training examples that have a target."""
    notes: Sequence[str] = ()
    """Messages for the user before the first round."""
    reuse: Reuse = field(default_factory=Reuse)
    """Values for the next run of this process."""
    generation: Generation | None = None
    """Evaluation by generated answers, if it is configured and there is a test set."""
    deployed: bool = False
    """Whether this is the server or a node of a deployment."""
    registered: int | None = None
    """The number of clients that have connected to a deployment's server."""

    @classmethod
    def make(cls, experiment: Experiment, federated_data: FederatedData, reuse: Reuse | None = None) -> "Session":
        """Loads the model and tokenizes the examples. In the session's experiment, `train.batches` is no longer `auto`.

        With `reuse`, values of an earlier session are not computed again; the result is the same.

        Raises:
            UserError: invalid model or device, a model that cannot be trained, or settings that do not fit `privacy`.
        """
        leaving(experiment)
        task, settings = task_of(dict(experiment.task)), experiment.train
        quiet()
        loaded = LoadedModel.load(task, experiment, federated_data.labelled_data.labels, reuse)
        adapted, tokenizer, checkpoint = loaded.adapted, loaded.tokenizer, loaded.checkpoint
        tokens = _tokens(task, tokenizer, federated_data, experiment, reuse)
        data = EncodedData.of(tokens, adapted.model, tokenizer, federated_data, settings.max_length)
        check_ranks(adapted.spec.modules, adapted.spec.rank_pattern, experiment.method.rank)
        private = experiment.privacy.unit == "record"
        if private:
            check_normalization(adapted.model)
        if settings.batches == "auto":
            settings = settings.model_copy(
                update={"batches": "random" if adapted.packing.works or private else "by-length"}
            )
            experiment = experiment.model_copy(update={"train": settings})
        start: Adapter = lora_init(adapted.spec, experiment.method.rank, experiment.seed)
        if experiment.lora.dora:
            start = with_magnitudes(start, adapted.spec.magnitudes)
        kept = bytes_per_token(adapted, task, data.examples, start)
        method = RememberedStates(method_of(experiment))
        max_tokens = settings.activation_memory_mb * 1_000_000 // kept
        trainer = LocalTrainer(
            adapted,
            task,
            data.examples,
            data.rows,
            data.held_out,
            data.test,
            settings,
            experiment.evaluate.batch_size,
            loaded.clients_per_step,
            1 if private and loaded.one_at_a_time else max_tokens,  # in such a model, examples influence each other, too
            experiment.rounds,
            client_privacy(experiment, method, adapted.spec, federated_data.clients, data.rows) if private else {},
        )
        sizes = {client: len(rows) for client, rows in data.rows.items()}
        notes = [
            *weakness_notes(experiment, sizes),
            *([slow] if (slow := hardware.slow_precision(settings.precision, settings.device)) else []),
            *checkpoint.notes,
            *data.notes,
            *schedule_notes(settings, data.rows),
        ]
        if loaded.one_at_a_time:
            notes.append(
                "clients are trained one at a time: together, they would not get what each gets alone in this model"
            )
        clients = [
            replace(client, examples=len(data.rows[client.id])) if client.id in data.rows else client
            for client in federated_data.clients
        ]
        generation = generation_of(experiment, task, adapted.model, tokenizer, data.test, federated_data.labelled_data.test)
        reuse = reuse or Reuse()
        return cls(experiment, federated_data, adapted, trainer, method, task, tokenizer, clients, notes, reuse, generation)

    @property
    def places(self) -> list[str]:
        """Names of the adapted modules and of the fully trained parameters."""
        return sorted([*self.adapted.spec.modules, *self.adapted.spec.head])

    def on_all_devices(self) -> "Session":
        """Returns the session with a process for each device of `train.devices` except the first.

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

        The adapters include the base updates, and thus all changes of the model.
        """
        simulation, rnd = self.simulation(folder), Round(done, self.experiment.seed)
        personal = self.experiment.method.row.personal
        clients = simulation.registered if personal else [ClientInfo("", self.method.rank, 1)]
        views = {one.id: simulation.view(one, self.method.send(run_state.server, one, rnd), rnd) for one in clients}
        base_updates = [folder.base_update(index) for index in run_state.base_updates.rounds]
        return {name: with_base_updates(view, base_updates) for name, view in views.items()} if base_updates else views

    def simulation(self, folder: RunFolder, clients: Sequence[ClientInfo] | None = None) -> SimulationBackend:
        """Simulation backend of these clients, by default of all, that stores their states in the run's folder.

        With privacy, the method and the server get neither their numbers of examples nor losses and steps.
        """
        known = self.clients if clients is None else clients
        if self.experiment.privacy.hides_counts:
            known = [replace(client, examples=1) for client in known]
        return SimulationBackend(
            self.method,
            self.adapted.spec,
            known,
            folder,
            self.trainer,
            self.experiment.seed,
            self.budgets,
            hides_training=self.experiment.privacy.unit != "none",
        )

    @property
    def budgets(self) -> Budgets:
        """The clients' privacy budgets."""
        return Budgets({client: one.steps for client, one in self.trainer.privacy.items()}, self.trainer.steps)

    def spent(self, client: ClientInfo, folder: RunFolder, rounds: int) -> Ledger:
        """The releases of a client's examples in all its trainings of the first `rounds` rounds of the folder's run."""
        privacy, steps = self.trainer.privacy.get(client.id), self.simulation(folder).private_steps(client, rounds)
        return [] if privacy is None else ledger(privacy, steps)


def check(experiment: Experiment, federated_data: FederatedData) -> list[str]:
    """Checks everything that `Session.make` checks, without reading the model's weights.

    Returns notes about the examples, and for tasks whose targets are tokens the first one, decoded.

    Raises:
        UserError: invalid model, tokenizer, targets, ranks or device, or settings that do not fit `privacy`.
    """
    leaving(experiment)
    if experiment.privacy.unit == "client":
        rate, clients = experiment.sampling.fraction, len(federated_data.clients)
        planned(experiment.privacy, rate, experiment.rounds, clients, secret=False)
    quiet()
    hardware.devices(experiment.train.device, experiment.train.devices)
    task = task_of(dict(experiment.task))
    model, tokenizer = task.outline(experiment.model, federated_data.labelled_data.labels)
    if experiment.privacy.unit == "record":
        check_normalization(model)
    lora, head = experiment.lora, head_modules(model, ())
    if experiment.quantize is not None:
        quantizable(model, experiment.quantize, head)
    found = find_targets(model, lora.targets, lora.rank_pattern, head, lora.alpha_pattern, lora.layers)
    check_ranks(found.sizes, found.ranks, experiment.method.rank)
    if experiment.train.gradient_checkpointing:
        checkpointed_blocks(model)
    if experiment.method.whole_model:
        other_parameters(model, found.sizes, head)
    tokens = encode(task, tokenizer, federated_data, experiment.train.max_length)
    data = EncodedData.of(tokens, model, tokenizer, federated_data, experiment.train.max_length)
    generation_of(experiment, task, model, tokenizer, data.test, federated_data.labelled_data.test)
    notes = [*weakness_notes(experiment, {client: len(rows) for client, rows in data.rows.items()}), *data.notes]
    return [*notes, *generation_notes(experiment, data.test), *data.first_example(task, tokenizer)]


def _tokens(
    task: Task, tokenizer: Any, federated_data: FederatedData, experiment: Experiment, reuse: Reuse | None
) -> Tokens:
    """As `encode`; with `reuse`, those of the same examples are not computed again."""
    settings = (experiment.model, experiment.task, experiment.train.max_length)
    if reuse is None:
        return encode(task, tokenizer, federated_data, experiment.train.max_length)
    rows = federated_data.fingerprint
    key = f"{settings} {rows.train} {rows.test}"
    return reuse.get("tokens", key, lambda: encode(task, tokenizer, federated_data, experiment.train.max_length))


def _trainer(experiment: Experiment, federated_data: FederatedData, device: str, threads: int) -> LocalTrainer:
    torch.set_num_threads(threads)
    train = experiment.train.model_copy(update={"device": device})
    trainer = Session.make(experiment.model_copy(update={"train": train}), federated_data).trainer
    assert isinstance(trainer, LocalTrainer)
    return trainer
