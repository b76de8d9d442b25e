"""A trained adapter on disk, in memory: that of a run, of an exported PEFT folder, or none for a merged model."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.adapter import Adapter
from fedlora.composed_method import method_of
from fedlora.config.experiment import Experiment, build
from fedlora.config.usage import TASK_AND_LABELS, check_overrides
from fedlora.data.examples import label_of
from fedlora.errors import UserError
from fedlora.exporting.base_updates import with_base_updates
from fedlora.exporting.forms import GGUF_ADAPTER, GGUF_MODEL
from fedlora.exporting.peft_folder import CONFIG, PeftFolder
from fedlora.exporting.usage_file import FILE, read_usage
from fedlora.federated_data import columns_of
from fedlora.linalg.lowrank import LowRank
from fedlora.loaded_model import LoadedModel
from fedlora.messages import Round
from fedlora.method import global_adapter
from fedlora.models.adapted import AdaptedModel
from fedlora.models.fingerprint import fingerprint
from fedlora.models.gguf import is_gguf
from fedlora.models.loading import quiet
from fedlora.models.requests import check_adapter
from fedlora.printable import listed
from fedlora.runs.damage import require_digest
from fedlora.runs.folder import DEPLOY
from fedlora.runs.manifest import Manifest
from fedlora.runs.saved_run import SavedRun
from fedlora.runs.saved_state import SavedState
from fedlora.tasks.table import task_of
from fedlora.tasks.task import Task
from fedlora.train import hardware


@dataclass(frozen=True)
class LoadedAdapter:
    """A model in memory, and a trained adapter for it; `notes` are for the user.

    The adapter does not include the base updates of the run.
    """

    task: Task
    adapted: AdaptedModel
    tokenizer: Any
    adapter: Adapter
    base_updates: Sequence[Mapping[str, LowRank]]
    notes: Sequence[str]

    def merged_base(self) -> "LoadedAdapter":
        """Merges the base updates into the model, as in the run: evaluations are then bit for bit those of the run."""
        for base_update in self.base_updates:
            self.adapted.merge_into_base(base_update)
        return LoadedAdapter(self.task, self.adapted, self.tokenizer, self.adapter, (), self.notes)

    def whole_adapter(self) -> Adapter:
        """The adapter with the base updates: all changes of the model."""
        return with_base_updates(self.adapter, self.base_updates) if self.base_updates else self.adapter


@dataclass(frozen=True)
class SavedAdapter:
    """A trained adapter on disk, with its settings and labels; `manifest` is that of the run, if it is one's.

    `adapter` needs the model, `base_updates` are separate from it.
    """

    path: Path
    experiment: Experiment
    labels: Sequence[str]
    adapter: Callable[[AdaptedModel], Adapter]
    base_updates: Sequence[Mapping[str, LowRank]] = ()
    manifest: Manifest | None = None
    dense: Sequence[str] = ()
    """Parameters that the adapter has without factors, apart from those that a run would train like this."""

    @classmethod
    def find(cls, path: str | Path, client: str | None = None, overrides: Sequence[str] = ()) -> "SavedAdapter":
        """The adapter in a run directory, which is only read, in a PEFT folder, or none in the folder or file of a model.

        Of a run, it is that of the best round with `evaluate.stop_after`, else of the last complete one. `client` names
        the client of a personal method. The overrides are as for `--set`.

        Raises:
            UserError: not such a directory, a damaged file, no such client, or an override of a setting that is not used.
        """
        path = Path(path).expanduser()
        if (path / "experiment.toml").is_file():
            check_overrides(overrides, fixed=TASK_AND_LABELS)
            return _of_run(path, client, overrides)
        check_overrides(overrides)
        if client is not None:
            raise UserError(f"{path}: not a run directory, so --client {client!r} does not apply; leave it out")
        if (path / CONFIG).is_file():
            return _of_peft(path, overrides)
        if (path / GGUF_ADAPTER).is_file() or path.name == GGUF_ADAPTER:
            raise UserError(
                f"{path}: an adapter in a GGUF file is for llama.cpp only; use the run directory, or export it --to adapter"
            )
        if (path / GGUF_MODEL).is_file():
            path = path / GGUF_MODEL
        if (path / "config.json").is_file() or (is_gguf(str(path)) and path.is_file()):
            return _of_model(path, overrides)
        raise UserError(
            f"{path}: expected a run directory, the folder of a PEFT adapter, or a model (a folder or a GGUF file)"
        )

    def load(self) -> LoadedAdapter:
        """Loads the model on the device of `train.device`.

        Raises:
            UserError: invalid model or device, a model that differs from that of the run, or one that the adapter does not
                fit.
        """
        experiment = self.experiment
        if self.manifest is not None:
            self.manifest.require_model(experiment.model, fingerprint(experiment.model))
        quiet()
        task, settings = task_of(dict(experiment.task)), experiment.train
        loaded = LoadedModel.for_inference(task, experiment, self.labels, self.dense)
        spec = loaded.adapted.spec
        if self.manifest is not None:
            self.manifest.require_modules(sorted([*spec.modules, *spec.head]))
        adapter = self.adapter(loaded.adapted)
        try:
            check_adapter(spec, adapter)
        except ValueError as error:
            raise UserError(f"{self.path}: the adapter does not fit model = {experiment.model!r}: {error}") from None
        slow = hardware.slow_precision(settings.precision, settings.device)
        return LoadedAdapter(task, loaded.adapted, loaded.tokenizer, adapter, self.base_updates, [slow] if slow else [])


def _of_run(path: Path, client: str | None, overrides: Iterable[str]) -> SavedAdapter:
    run = SavedRun.read(path)
    manifest, experiment = run.manifest, run.experiment
    clients = {one.id: one for one in manifest.data.client_infos()}
    if experiment.method.row.personal:
        if (path / DEPLOY).exists():
            raise UserError(f"{path}: every client's own adapter is in its node's folder, in runs/*/adapter")
        if client is None:
            raise UserError(f"{path}: {experiment.method.name} has an adapter for each client: choose one with --client")
        if client not in clients:
            raise UserError(f"{client!r}: the run has no such client; available: {listed(list(map(repr, clients)), 5)}")
    elif client is not None:
        raise UserError(f"{path}: {experiment.method.name} has one adapter for all clients; leave out --client")
    info = None if client is None else clients[client]
    state = SavedState.read(path, info)
    require_digest(path / "environment.json", manifest.environment)
    packed = json.loads((path / "environment.json").read_text(encoding="utf-8"))["packed"]  # as tested when it began
    table = experiment.model_copy(update={"train": experiment.train.model_copy(update={"packed": packed})})
    experiment = build(table.model_dump(exclude_none=True), overrides, "--set")
    if state.best is not None:
        best = state.best[client or ""]
        return SavedAdapter(path, experiment, manifest.data.labels, lambda _: best, (), manifest)

    def adapter(adapted: AdaptedModel) -> Adapter:
        method, rnd = method_of(experiment), Round(state.done, experiment.seed)
        if info is None:
            return global_adapter(method, adapted.spec, state.server.server, rnd)
        saved = state.client_state
        own = method.init_client(adapted.spec, info, experiment.seed) if saved is None else saved
        return method.view(own, method.send(state.server.server, info, rnd), info)

    return SavedAdapter(path, experiment, manifest.data.labels, adapter, state.base_updates, manifest)


def _of_peft(path: Path, overrides: Iterable[str]) -> SavedAdapter:
    found = PeftFolder.read(path)
    experiment = _build(path, {"model": found.base, **read_usage(path), "lora": found.lora}, overrides)
    dense = [name for name, part in found.adapter.items() if part.in_head]
    return SavedAdapter(path, experiment, _labels(path, experiment), lambda _: found.adapter, dense=dense)


def _of_model(path: Path, overrides: Iterable[str]) -> SavedAdapter:
    folder = path.parent if is_gguf(str(path)) else path
    table = {**read_usage(folder), "model": str(path), "lora": {"targets": "all-linear"}}
    experiment = _build(path, table, overrides)
    return SavedAdapter(path, experiment, _labels(path, experiment), lambda _: {})


def _build(path: Path, table: dict[str, Any], overrides: Iterable[str]) -> Experiment:
    """The experiment of a folder without a run.

    Raises:
        UserError: the task is not known.
    """
    overrides = list(overrides)
    if "task" not in table and not any(one.startswith("task") for one in overrides):
        raise UserError(
            f"{path}: has no {FILE}, which names the task; set the task and its columns, for example "
            "--set task=KIND --set data.text=COLUMN (docs/tasks.md)"
        )
    train = {"packed": False, **table.get("train", {})}
    return build({**table, "train": train}, overrides, str(path))


def _labels(path: Path, experiment: Experiment) -> Sequence[str]:
    """The names of the labels, for a task with labels: those in the settings, else in labels.json or config.json.

    Raises:
        UserError: none of them has any.
    """
    if label_of(columns_of(experiment)) is None:
        return ()
    labels = experiment.data.labels or _read(path / "labels.json") or (_read(path / "config.json") or {}).get("id2label")
    if not labels:
        raise UserError(
            f"{path}: has no names of labels; set them, in their order, for example --set data.labels=['a', 'b']"
        )
    return list(labels.values() if isinstance(labels, dict) else labels)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error
