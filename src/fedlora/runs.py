"""A run, as its folder tells of it: what was run, with which versions, and what came out."""

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from fedlora.config import Experiment, read
from fedlora.errors import UserError
from fedlora.rounds.checkpoint import RunFolder
from fedlora.train.hardware import fast_in_bf16

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


def settled(experiment: Experiment) -> Experiment:
    """With the precision that `auto` stands for here: what is resumed elsewhere must compute the same."""
    if experiment.train.precision != "auto":
        return experiment
    train = experiment.train.model_copy(update={"precision": "bf16" if fast_in_bf16(experiment.train.device) else "fp32"})
    return experiment.model_copy(update={"train": train})


def record(folder: RunFolder, experiment: Experiment, **found: Any) -> None:
    """Writes down what is run, with which versions, and what was found out before: which way the clients train."""
    folder.record("experiment.toml", experiment.to_toml())
    folder.record("environment.json", json.dumps({**_environment(), **found}, indent=1))


def _environment() -> dict[str, Any]:
    """Versions of what the numbers depend on."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }
