"""Settings with which a trained adapter is used: the few that evaluation and prediction read."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from fedlora.config.experiment import Experiment
from fedlora.errors import UserError

_COLUMNS = ("text", "text_pair", "image", "label", "tokens", "tags", "prompt", "response", "messages", "options", "answer")
_OF_EXAMPLES = {
    "data": (*_COLUMNS, "labels"),
    "train": ("max_length",),
    "evaluate": ("max_new_tokens", "text_metrics"),
}
_OF_COMPUTATION = ("model", "train.device", "train.precision", "evaluate.batch_size", "evaluate.generate")
TASK_AND_LABELS = ("task", "data.labels")


def form_of_examples(experiment: Experiment, labels: Sequence[str]) -> dict[str, Any]:
    """The table of the settings that determine task, columns and inputs of the model, without defaults."""
    table: dict[str, Any] = {"task": {"kind": experiment.task.kind, **experiment.task.model_dump(exclude_defaults=True)}}
    for section, keys in _OF_EXAMPLES.items():
        table[section] = getattr(experiment, section).model_dump(include=set(keys), exclude_defaults=True)
    if labels:
        table["data"]["labels"] = list(labels)
    return {section: values for section, values in table.items() if values}


def check_overrides(overrides: Iterable[str], fixed: Collection[str] = ()) -> None:
    """Rejects overrides of settings that do not matter for a trained adapter, and of those that are `fixed`.

    Raises:
        UserError: names the setting and the allowed ones.
    """
    keys = ["task", *(f"{section}.{key}" for section, keys in _OF_EXAMPLES.items() for key in keys), *_OF_COMPUTATION]
    allowed = [key for key in keys if key not in fixed]
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key not in allowed and not ("task" in allowed and key.startswith("task.")):
            raise UserError(f"--set {key}: cannot be changed here; allowed: {', '.join(sorted(allowed))}")
