"""Federated fine-tuning of transformers with LoRA adapters.

>>> from fedlora import Experiment
>>> Experiment(rounds=3).method.name
'fedit'
"""

from typing import TYPE_CHECKING, Any

from fedlora.version import __version__

if TYPE_CHECKING:
    from fedlora.config import Experiment
    from fedlora.experiment import resume, run
    from fedlora.runs.start import Result

__all__ = ["Experiment", "Result", "__version__", "resume", "run"]

_HOMES = {"Experiment": "config", "Result": "runs.start", "resume": "experiment", "run": "experiment"}


def __getattr__(name: str) -> Any:
    """Imports on first use: torch and transformers take seconds that `fedlora --help` should not."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fedlora' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"fedlora.{_HOMES[name]}"), name)
