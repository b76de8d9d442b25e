"""From an experiment to a run: the data divided, the model loaded, the rounds, the exported adapters."""

import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch

from fedlora.adapter import Adapter, Full, lora_init
from fedlora.config import Experiment, read
from fedlora.data.partition import Division, divide, share
from fedlora.data.ranks import client_ranks
from fedlora.data.sources import Corpus, load, load_own
from fedlora.errors import UserError
from fedlora.export import fixed, to_merged, to_peft, unfit
from fedlora.linalg.combine import stack
from fedlora.linalg.fit import recompress
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Round
from fedlora.method import AnyMethod
from fedlora.methods.wrap.head import with_head
from fedlora.rounds.checkpoint import DEPLOY, RunFolder, client_folder
from fedlora.rounds.loop import Exchange, Plan, Progress, Watcher, play
from fedlora.rounds.sample import check_cohort
from fedlora.rounds.simulate import Simulation
from fedlora.train.batched import bytes_per_token
from fedlora.train.devices import Helper, ManyDevices
from fedlora.train.features import try_packing
from fedlora.train.inject import Adapted, Scaling, head_modules, norm_modules
from fedlora.train.local import LocalTrainer
from fedlora.train.tasks import Classification, locate, quiet

_PACKAGES = (
    "fedlora",
    "torch",
    "transformers",
    "peft",
    "datasets",
    "flwr-datasets",
    "safetensors",
    "numpy",
    "scikit-learn",
    "POT",
)


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, the round log's rows, and where the PEFT adapters are (one, or one for each client).

    `left_out` says why adapters are missing, if any are.
    """

    folder: Path
    rows: Sequence[Mapping[str, Any]]
    adapters: Mapping[str, Path]
    left_out: str = ""


class Silent:
    """Shows no progress."""

    def round_started(self, rnd: Round, chosen: Sequence[ClientInfo]) -> None:
        """Nothing."""

    def answered(self, who: ClientInfo, refused: str | None) -> None:
        """Nothing."""

    def round_ended(self, row: Mapping[str, Any]) -> None:
        """Nothing."""


def run(experiment: Experiment | None = None, out: str | Path | None = None, watch: Watcher | None = None) -> Result:
    """Runs an experiment from its first round to its exported adapters; `out` is a new folder, by default in `runs/`.

    Raises:
        UserError: the experiment, the data, the model or the folder cannot be used; nothing was trained.
        RunStopped: the run cannot go on; `resume` takes it up again.
    """
    experiment = settled(experiment or Experiment())
    folder = RunFolder.create(Path(out) if out is not None else new_folder(experiment))
    try:
        return _run(experiment, folder, watch or Silent())
    finally:
        folder.release()


def new_folder(experiment: Experiment) -> Path:
    """The folder that a run gets when none is named: the time and the method."""
    return Path("runs", f"{datetime.now():%Y%m%d-%H%M%S}-{experiment.method.name}")


def read_folder(path: Path) -> Experiment:
    """The experiment of an earlier run.

    Raises:
        UserError: the folder holds no run.
    """
    if not (path / "experiment.toml").is_file():
        raise UserError(f"{path}: no run here: it has no experiment.toml")
    return read(path / "experiment.toml")


def resume(path: str | Path, watch: Watcher | None = None) -> Result:
    """Takes a run up after its last complete round; the result is the same as if it had never stopped.

    Raises:
        UserError: the folder holds no run, another process has it, or it cannot be read.
        RunStopped: the run cannot go on.
    """
    with _opened(Path(path)) as (folder, experiment):
        return _run(experiment, folder, watch or Silent())


def export(
    path: str | Path, to: Literal["adapter", "merged"], out: str | Path, client: str | None = None
) -> Mapping[str, Path]:
    """Writes the adapter of a run as it stands, as a PEFT folder or merged into the model; returns the folders.

    Of a personal method, every client's adapter is written to a folder of its own, or only that of `client`.

    Raises:
        UserError: no such run or client, no complete round yet, `out` is in use, `to` is merged without a client for a
            personal method, or the adapter is no fixed matrix.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is not empty; choose another directory")
    with _opened(Path(path)) as (folder, experiment):
        done, progress = folder.restore()
        if not done:
            raise UserError(f"{path}: has no complete round yet; there is nothing to export")
        if experiment.method.row.personal and (folder.path / DEPLOY).exists():
            raise UserError(f"{path}: every client's own adapter is in its node's folder, in runs/*/adapter")
        elsewhere = experiment.data.source == "none"
        bench = Bench.make(experiment, Problem.of_server(experiment) if elsewhere else Problem.make(experiment))
        adapters = bench.adapters(progress, folder, done)
        if client is not None:
            if client not in adapters:
                raise UserError(f"{client!r}: no such client with an adapter of its own; there are {_some(adapters)}")
            adapters = {"": adapters[client]}
        if to == "merged" and len(adapters) > 1:
            raise UserError(f"{experiment.method.name} has an adapter for each client: choose one with --client")
        try:
            return bench.write(adapters, out, to)
        except OSError as error:
            raise UserError(f"{out}: cannot be written: {error.strerror or error}") from error


@dataclass(frozen=True)
class Problem:
    """The examples divided among the clients."""

    corpus: Corpus
    division: Division
    members: Sequence[ClientInfo]

    @classmethod
    def make(cls, experiment: Experiment) -> "Problem":
        """Reads and divides the data; takes no model.

        Raises:
            UserError: the data cannot be read, or not be divided so.
        """
        corpus = load(experiment.data, experiment.seed)
        division = divide(corpus.train, experiment.clients, experiment.seed)
        wanted, count = experiment.clients.ranks, len(division.shares)
        if isinstance(wanted, list) and len(wanted) != count:
            raise UserError(f"clients.ranks has {len(wanted)} entries, the data give {count} clients")
        if long := [share.client for share in division.shares if len(client_folder(share.client)) > 200]:
            raise UserError(f"the client's name {long[0]!r} is too long for a folder; shorten the names in data.user")
        check_cohort(count, experiment.sampling)
        ranks = client_ranks(wanted, count, experiment.method.rank, experiment.seed)
        shares = zip(division.shares, ranks, strict=True)
        members = [ClientInfo(share.client, rank, len(share.train), share.task) for share, rank in shares]
        return cls(corpus, division, members)

    @classmethod
    def of_server(cls, experiment: Experiment) -> "Problem":
        """Only the global test set and the names of the labels: the clients have their examples elsewhere.

        Raises:
            UserError: the data cannot be read.
        """
        corpus = load(experiment.data, experiment.seed)
        return cls(replace(corpus, train=corpus.train.select([])), Division((), 0, 0), [])

    @classmethod
    def of_client(cls, experiment: Experiment, client: str, file: str, rank: int, labels: Sequence[str]) -> "Problem":
        """One client's own file; no global test set.

        Raises:
            UserError: the file cannot be read, or has a label that is not among `labels`.
        """
        examples = load_own(experiment.data, file, labels, experiment.seed)
        own = share(client, list(range(len(examples))), experiment.clients.held_out, experiment.seed)
        corpus = Corpus(examples, examples.select([]), tuple(labels))
        return cls(corpus, Division((own,), 0, 0), [ClientInfo(client, rank, len(own.train))])


@dataclass(frozen=True)
class Bench:
    """Everything a run needs in memory, on a server or on a client."""

    experiment: Experiment
    problem: Problem
    adapted: Adapted
    trainer: LocalTrainer | ManyDevices
    method: AnyMethod

    @classmethod
    def make(cls, experiment: Experiment, problem: Problem) -> "Bench":
        """Loads the model and tokenizes the examples.

        Raises:
            UserError: the model or the device cannot be used.
        """
        task, settings = Classification(), experiment.train
        quiet()
        model, tokenizer, missing = task.load(experiment.model, problem.corpus.labels, experiment.seed)
        model.to(_device(settings.device))
        head = head_modules(model, missing)
        adapted = Adapted(
            model,
            Scaling(experiment.lora.alpha, experiment.lora.rslora),
            experiment.lora.targets,
            experiment.lora.dropout,
            experiment.lora.rank_pattern,
            head + (norm_modules(model, head) if experiment.method.with_norms else ()),
            torch.bfloat16 if settings.precision == "bf16" else torch.float32,
        )
        if settings.packed:
            try_packing(adapted, task, tokenizer, settings.max_length)
        examples = task.encode(tokenizer, problem.corpus.train[:], settings.max_length)
        kept = bytes_per_token(adapted, task, examples, lora_init(adapted.spec, experiment.method.rank, experiment.seed))
        trainer = LocalTrainer(
            adapted,
            task,
            examples,
            {share.client: torch.as_tensor(share.train) for share in problem.division.shares},
            {share.client: torch.as_tensor(share.held_out) for share in problem.division.shares},
            task.encode(tokenizer, problem.corpus.test[:], settings.max_length),
            settings,
            experiment.evaluate.batch_size,
            settings.together,
            settings.memory_mb * 1_000_000 // kept,
        )
        method = with_head(experiment.method.make(), experiment.method.head or experiment.method.row.head)
        return cls(experiment, problem, adapted, trainer, method)

    def on_all_devices(self) -> "Bench":
        """The same, with a process for each device that `train.devices` asks for but the first.

        Raises:
            UserError: there are not so many.
        """
        assert isinstance(self.trainer, LocalTrainer)
        count = devices(self.experiment)
        if count == 1:
            return self
        if _device(self.experiment.train.device).type == "cuda":
            names, threads = [f"cuda:{i}" for i in range(1, count)], torch.get_num_threads()
        else:
            names, threads = ["cpu"] * (count - 1), max(1, torch.get_num_threads() // count)
        torch.set_num_threads(threads)
        helpers = [Helper(name, _trainer, self.experiment, self.problem, name, threads) for name in names]
        return replace(self, trainer=ManyDevices(self.trainer, helpers))

    def adapters(self, progress: Progress, folder: RunFolder, done: int) -> dict[str, Adapter]:
        """The global adapter under the empty name, or each client's own under its id, after `done` rounds.

        They stand for all that changed since the model was loaded: folds are a part of them.
        """
        simulation, rnd = self.simulation(folder), Round(done, self.experiment.seed)
        who = self.problem.members if self.experiment.method.row.personal else [ClientInfo("", self.method.rank, 1)]
        views = {one.id: simulation.view(one, self.method.send(progress.server, one, rnd), rnd) for one in who}
        folds = [folder.fold(index) for index in progress.folds.rounds]
        return {name: with_folds(view, folds) for name, view in views.items()} if folds else views

    def simulation(self, folder: RunFolder) -> Simulation:
        """The exchange with the clients' states in the run's folder."""
        return Simulation(self.method, self.adapted.spec, self.problem.members, folder, self.trainer, self.experiment.seed)

    def write(self, adapters: Mapping[str, Adapter], out: Path, to: Literal["adapter", "merged"]) -> dict[str, Path]:
        """Writes each adapter to `out`, or to a folder in `out` named by its client; returns the folders.

        Raises:
            UserError: one of them has no place there; nothing was written.
        """
        for name, adapter in adapters.items():
            if reason := unfit(adapter):
                raise UserError(f"the adapter{f' of client {name!r}' if name else ''} cannot be exported: {reason}")
        labels, lora = self.problem.corpus.labels, self.experiment.lora
        folders = {name: out / client_folder(name) if name else out for name in adapters}
        for name, adapter in adapters.items():
            if to == "adapter":
                to_peft(adapter, folders[name], lora, locate(self.experiment.model), self.adapted, labels)
            else:
                model, tokenizer, _ = Classification().load(self.experiment.model, labels, self.experiment.seed)
                to_merged(adapter, folders[name], model, tokenizer)
        return folders


def _run(experiment: Experiment, folder: RunFolder, watch: Watcher) -> Result:
    bench = Bench.make(experiment, Problem.make(experiment)).on_all_devices()
    progress = rounds(bench, folder, watch, bench.simulation(folder))
    adapters = bench.adapters(progress, folder, experiment.rounds)
    reasons = [reason for adapter in adapters.values() if (reason := unfit(adapter))]
    left_out = f"{len(reasons)} of {len(adapters)} not written: {reasons[0]}" if reasons else ""
    able = {name: adapter for name, adapter in adapters.items() if not unfit(adapter)}
    return Result(folder.path, folder.rows(), bench.write(able, folder.path / "adapter", "adapter"), left_out)


def rounds(bench: Bench, folder: RunFolder, watch: Watcher, exchange: Exchange) -> Progress:
    """Runs the rounds that the folder lacks with the clients of the exchange; what the server knows after the last.

    Raises:
        UserError: the folder cannot be read.
        RunStopped: the run cannot go on; all complete rounds are in the folder.
    """
    experiment = bench.experiment
    progress: Progress
    done, progress = folder.restore()
    if not folder.experiment.exists():
        record(folder, experiment, clients_in_a_step=bench.trainer.together, tokens_in_a_pass=bench.trainer.tokens)
    method, spec = bench.method, bench.adapted.spec
    plan = Plan(
        method,
        spec,
        experiment.seed,
        experiment.sampling,
        experiment.evaluate,
        experiment.rounds,
        experiment.method.weights == "uniform",
        None if experiment.method.row.personal or not len(bench.trainer.test) else bench.trainer.judge,
    )
    progress = Progress(method.init_server(spec, experiment.seed)) if done == 0 else progress
    for index in progress.folds.rounds:
        bench.trainer.fold(folder.fold(index))
    for after, row in play(plan, exchange, folder, progress, done, watch):
        folder.commit(row["round"], after, row)
        progress = after
    return progress


def settled(experiment: Experiment) -> Experiment:
    """With the precision that `auto` stands for here: what is resumed elsewhere must compute the same."""
    if experiment.train.precision != "auto":
        return experiment
    if _device(experiment.train.device).type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = any(getattr(torch.cpu, name, bool)() for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    train = experiment.train.model_copy(update={"precision": "bf16" if fast else "fp32"})
    return experiment.model_copy(update={"train": train})


def record(folder: RunFolder, experiment: Experiment, **measured: int) -> None:
    """Writes down what is run, with which versions, and what was measured before."""
    folder.record("experiment.toml", experiment.to_toml())
    folder.record("environment.json", json.dumps({**_environment(), **measured}, indent=1))


@contextmanager
def _opened(path: Path) -> Iterator[tuple[RunFolder, Experiment]]:
    """The folder of an earlier run, locked, and its experiment."""
    experiment = read_folder(path)
    folder = RunFolder(path)
    try:
        yield folder, experiment
    finally:
        folder.release()


def with_folds(view: Adapter, folds: Sequence[Mapping[str, LowRank]]) -> Adapter:
    """The adapter and the folds as one adapter, of the numerical rank of their sum."""
    return {
        name: part
        if isinstance(part, Full) or not any(name in fold for fold in folds)
        else recompress(stack([(1.0, one) for one in (fixed(part).pair(), *(f[name] for f in folds if name in f))]))
        for name, part in view.items()
    }


def _device(choice: str) -> torch.device:
    if choice == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=choice).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"train.device = {choice!r} is not to be had here: {str(error).splitlines()[0]}") from error


def devices(experiment: Experiment) -> int:
    """How many are to train at once.

    Raises:
        UserError: there are not so many.
    """
    wanted, device = experiment.train.devices, experiment.train.device
    if _device(device).type != "cuda":
        return 1 if wanted == "auto" else wanted
    there = torch.cuda.device_count()
    if ":" in device:
        if wanted not in (1, "auto"):
            raise UserError(f"train.device = {device!r} is one device; for train.devices = {wanted} say 'cuda'")
        return 1
    if wanted != "auto" and wanted > there:
        raise UserError(f"train.devices = {wanted}: this machine has {there}")
    return there if wanted == "auto" else wanted


def _trainer(experiment: Experiment, problem: Problem, device: str, threads: int) -> LocalTrainer:
    torch.set_num_threads(threads)
    train = experiment.train.model_copy(update={"device": device})
    trainer = Bench.make(experiment.model_copy(update={"train": train}), problem).trainer
    assert isinstance(trainer, LocalTrainer)
    return trainer


def _environment() -> dict[str, Any]:
    """Versions of what the numbers depend on."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _some(names: Mapping[str, Any]) -> str:
    first = [name or "the global one" for name in list(names)[:5]]
    return ", ".join(first) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
