"""Federated fine-tuning of transformers with LoRA adapters.

    from fedlora import Experiment, run

    experiment = Experiment(model="FacebookAI/roberta-base", data="tickets.jsonl", rounds=20, method={"name": "fedit"})
    result = run(experiment, out="runs/first")
    print(result.to_pandas(), result.adapters)

`run` trains, `resume` continues an interrupted run, `export` writes the adapter of a run for use elsewhere, `sweep` runs
experiments that differ in some settings, `compare` compares runs; `evaluate` and `predict` use a trained adapter.
`Experiment` has the settings of experiment.toml under the same names. Settings, data and models that cannot be used raise
`UserError`; a run that has to stop raises `RunStopped`.
Both messages are one line.
"""

from typing import TYPE_CHECKING, Any

from fedlora.errors import RunStopped, UserError
from fedlora.version import __version__

if TYPE_CHECKING:
    from fedlora.api import export, resume, run
    from fedlora.config.experiment import Experiment
    from fedlora.evaluating import evaluate
    from fedlora.predicting import predict
    from fedlora.report.comparison import Comparison, compare
    from fedlora.runs.result import Result
    from fedlora.sweeping import sweep

__all__ = [
    "Comparison",
    "Experiment",
    "Result",
    "RunStopped",
    "UserError",
    "__version__",
    "compare",
    "evaluate",
    "export",
    "predict",
    "resume",
    "run",
    "sweep",
]

_HOMES = {
    "Comparison": "report.comparison",
    "Experiment": "config.experiment",
    "Result": "runs.result",
    "compare": "report.comparison",
    "evaluate": "evaluating",
    "export": "api",
    "predict": "predicting",
    "resume": "api",
    "run": "api",
    "sweep": "sweeping",
}


def __getattr__(name: str) -> Any:
    """Imports on first use: torch and transformers take seconds that `fedlora --help` should not."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fedlora' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"fedlora.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
