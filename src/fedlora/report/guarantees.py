"""Which guarantees of differential privacy each method supports, by the rule that is applied to experiments."""

from functools import cache
from typing import Any, Literal

from fedlora.config.experiment import Experiment
from fedlora.methods.row import Row
from fedlora.privacy.release import covering_settings, refusal, setting_text


def guarantee(row: Row, unit: Literal["record", "client"]) -> str:
    """Whether the method supports `privacy.unit`: yes, perhaps with one of its settings changed, or no and the reason."""
    return _guarantee(row.name, unit, row.mixed_ranks)


@cache
def _guarantee(name: str, unit: str, mixed_ranks: bool) -> str:
    experiment, changes = _experiment(unit, {"name": name}), dict[str, dict[str, Any]]()
    if (reason := refusal(experiment)) is not None:
        changes = {setting_text(experiment, key, value): {key: value} for key, value in covering_settings(experiment)}
        if not changes:
            return f"no: {reason}"
    needs = []
    for text, change in (changes or {"": {}}).items():
        equal = mixed_ranks and refusal(_experiment(unit, {"name": name, **change}, clients={"ranks": "uniform"}))
        needs.append(" and ".join([*([f"`{text}`"] if text else []), *(["equal ranks"] if equal else [])]))
    return "yes, with " + " or ".join(needs) if all(needs) else "yes"


def _experiment(unit: str, method: dict[str, Any], **more: Any) -> Experiment:
    privacy = {"unit": unit, "noise_multiplier": 1.0, "delta": 1e-5}
    return Experiment.model_validate({"method": method, "privacy": privacy, "evaluate": {"clients": "none"}, **more})
