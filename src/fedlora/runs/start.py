"""Metadata of a run directory: the experiment and the versions."""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from fedlora.config.experiment import Experiment, build
from fedlora.config.reading import read_table
from fedlora.errors import UserError
from fedlora.paths import absolute, is_local, looks_local
from fedlora.runs.folder import RunFolder
from fedlora.runs.manifest import Manifest
from fedlora.train.hardware import fast_in_bf16

_PACKAGES = (
    "fedlora",
    "torch",
    "transformers",
    "peft",
    "datasets",
    "dp-accounting",
    "flwr-datasets",
    "safetensors",
    "numpy",
    "scikit-learn",
    "POT",
)


def new_folder(experiment: Experiment) -> Path:
    """Default folder of a run, named by the time and the method."""
    return Path("runs", f"{datetime.now():%Y%m%d-%H%M%S}-{experiment.method.name}")


def read_folder(path: Path) -> Experiment:
    """Experiment of an earlier run; the only permitted edit of experiment.toml is a larger number of rounds.

    Raises:
        UserError: not a run directory, or experiment.toml differs in any other setting.
    """
    file = path / "experiment.toml"
    if not file.is_file():
        raise UserError(f"{path}: not a run directory: it has no experiment.toml")
    given, manifest = read_table(file), Manifest.find(path)
    if manifest is None:
        return build(given, origin=str(file))
    rounds = _more_rounds(str(file), manifest.experiment, given)
    return manifest.settings().model_copy(update={"rounds": rounds})


@contextmanager
def opened(path: Path, seconds: float = 0.0) -> Iterator[tuple[RunFolder, Experiment]]:
    """Locks and returns the folder of an earlier run, with its experiment; waits up to `seconds` for the lock."""
    experiment = read_folder(path)
    folder = RunFolder(path, seconds)
    try:
        yield folder, experiment
    finally:
        folder.release()


def extend(path: Path, overrides: Iterable[str]) -> None:
    """Increases the rounds of an earlier run by overrides as for `--set`; only `rounds` may be changed.

    Raises:
        UserError: not a run directory, locked by another process, or the overrides change another setting.
    """
    folder = RunFolder(path)
    try:
        saved = read_folder(path)
        changed = build(saved.model_dump(exclude_none=True), overrides, "--set")
        rounds = _more_rounds("--set", saved.model_dump(mode="json"), changed.model_dump(mode="json"))
        keep_rounds(folder, saved.model_copy(update={"rounds": rounds}))
    finally:
        folder.release()


def keep_rounds(folder: RunFolder, experiment: Experiment) -> None:
    """Records the new number of rounds of a run; after a crash, only experiment.toml may have the larger number."""
    manifest = Manifest.find(folder.path)
    folder.record("experiment.toml", experiment.to_toml())
    if manifest is not None and manifest.experiment["rounds"] != experiment.rounds:
        settings = {**manifest.experiment, "rounds": experiment.rounds}
        folder.change(manifest.model_copy(update={"experiment": settings}).model_dump())


def resolve_settings(experiment: Experiment) -> Experiment:
    """The experiment with `auto` and relative paths resolved, so that a run resumed elsewhere computes the same."""
    data, train = experiment.data, experiment.train
    if train.precision == "auto":
        train = train.model_copy(update={"precision": "bf16" if fast_in_bf16(train.device) else "fp32"})
    places = {key: name for key in ("source", "test") if (name := getattr(data, key)) and looks_local(name)}
    data = data.model_copy(update={key: absolute(name) for key, name in places.items()})
    model = absolute(experiment.model) if is_local(experiment.model) else experiment.model
    clients = experiment.clients.model_copy(update={"count": experiment.clients.size})
    return experiment.model_copy(update={"model": model, "data": data, "clients": clients, "train": train})


def record(folder: RunFolder, experiment: Experiment, **found: Any) -> str:
    """Records the experiment, the versions, and the values in `found`, which determine how clients are trained.

    Returns a digest of the versions' file.
    """
    environment = json.dumps({**_environment(), **found}, indent=1)
    folder.record("experiment.toml", experiment.to_toml())
    folder.record("environment.json", environment)
    return hashlib.sha256(environment.encode()).hexdigest()


def _more_rounds(origin: str, saved: Mapping[str, Any], given: Mapping[str, Any]) -> int:
    """Number of rounds in `given`, which must otherwise equal `saved` and have at least as many rounds.

    Raises:
        UserError: they differ, or the learning rate or the noise of each round depends on their number; names the setting.
    """
    was, now = _flat(saved), _flat(given)
    more = isinstance(now.get("rounds"), int) and now["rounds"] >= was["rounds"]
    for key in sorted(was.keys() | now.keys()):
        if was.get(key) != now.get(key) and not (key == "rounds" and more):
            raise UserError(
                f"{origin}: {key} = {now.get(key)!r}, in the run it is {was.get(key)!r}; a resumed run keeps its settings, "
                "except for `rounds`, which may be increased"
            )
    if now["rounds"] != was["rounds"] and (schedule := was.get("train.round_schedule", "constant")) != "constant":
        raise UserError(
            f"{origin}: rounds = {now['rounds']!r}, in the run it is {was['rounds']!r}; it cannot be increased with "
            f"train.round_schedule = {schedule!r}, by which the learning rates of all rounds depend on it"
        )
    if now["rounds"] != was["rounds"] and (epsilon := was.get("privacy.epsilon")) is not None:
        raise UserError(
            f"{origin}: rounds = {now['rounds']!r}, in the run it is {was['rounds']!r}; it cannot be increased with "
            f"privacy.epsilon = {epsilon!r}, which holds for the run's rounds"
        )
    return int(now["rounds"])


def _flat(table: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """Settings by their dotted names, without those that are None."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{at}{key}.")
        elif value is not None:
            found[f"{at}{key}"] = value
    return found


def _environment() -> dict[str, Any]:
    """Versions on which numerical results depend."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }
