"""File fedlora.toml of an exported adapter or model: the settings with which fedlora uses it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

from fedlora.config.experiment import Experiment
from fedlora.config.reading import read_table
from fedlora.config.usage import form_of_examples

FILE = "fedlora.toml"


def write_usage(experiment: Experiment, labels: Sequence[str], folder: Path, with_model: bool) -> None:
    """Writes task, columns and inputs of the model, and for an adapter, `with_model`, its base model and quantization."""
    model = {"model": experiment.model} if with_model else {}
    if with_model and experiment.quantize is not None:
        model["quantize"] = experiment.quantize
    (folder / FILE).write_text(tomli_w.dumps({**model, **form_of_examples(experiment, labels)}), encoding="utf-8")


def read_usage(folder: Path) -> dict[str, Any]:
    """The table in the file; empty if there is none.

    Raises:
        UserError: not readable as TOML.
    """
    return read_table(folder / FILE) if (folder / FILE).is_file() else {}
