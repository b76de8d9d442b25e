"""Settings that do not fit `privacy.unit`."""

from typing import Any

import pytest

from fedlora.config.experiment import Experiment
from fedlora.errors import UserError

PRIVACY = {"noise_multiplier": 1.0, "delta": 1e-5}


@pytest.mark.parametrize("unit", ["record", "client"])
@pytest.mark.parametrize(
    ("section", "settings", "key"),
    [
        ("evaluate", {}, "evaluate.clients = 'all'"),
        ("evaluate", {"clients": "chosen"}, "evaluate.clients = 'chosen'"),
        ("evaluate", {"stop_after": 2}, "evaluate.stop_after = 2"),
        ("sampling", {"check_cohort": True}, "sampling.check_cohort = true"),
    ],
)
def test_what_would_tell_something_without_noise_is_rejected(
    unit: str, section: str, settings: dict[str, Any], key: str
) -> None:
    given = {"evaluate": {"clients": "none"}, section: settings, "privacy": {"unit": unit, **PRIVACY}}
    with pytest.raises(UserError, match=f"{key} is not supported by privacy.unit = '{unit}'"):
        Experiment(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(("key", "value"), [("max_norm", 3.0), ("attempts", 2), ("min_replies", 2)])
def test_limits_that_privacy_of_clients_replaces_are_rejected_and_allowed_for_records(key: str, value: Any) -> None:
    given: dict[str, Any] = {"evaluate": {"clients": "none"}, "sampling": {key: value}}
    assert Experiment(privacy={"unit": "record", **PRIVACY}, **given).sampling.fraction == 1  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"sampling.{key} = .* is not supported by privacy.unit = 'client'"):
        Experiment(privacy={"unit": "client", **PRIVACY}, **given)  # type: ignore[arg-type]


def test_a_largest_cohort_is_at_least_the_expected_one_of_a_known_number_of_clients() -> None:
    given: dict[str, Any] = {"evaluate": {"clients": "none"}, "sampling": {"fraction": 0.1}}
    limited = {"unit": "client", **PRIVACY, "largest_cohort": 3}
    assert Experiment(privacy=limited, clients={"count": 30}, **given).privacy.largest_cohort == 3  # type: ignore[arg-type]
    reason = r"privacy\.largest_cohort = 3: expected at least 3\.1, .*sampling\.fraction = 0\.1 of 31 clients"
    with pytest.raises(UserError, match=reason):
        Experiment(privacy=limited, clients={"count": 31}, **given)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"privacy\.largest_cohort = 3 needs clients\.count"):
        Experiment(privacy=limited, clients={"partition": "natural"}, data={"user": "who"}, **given)  # type: ignore[arg-type]


def test_owners_of_several_tasks_are_rejected_for_clients_and_allowed_for_records() -> None:
    given: dict[str, Any] = {"evaluate": {"clients": "none"}, "data": {"task": "kind"}}
    assert Experiment(privacy={"unit": "record", **PRIVACY}, **given).data.task == "kind"  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"data\.task = 'kind' is not supported by privacy\.unit = 'client'"):
        Experiment(privacy={"unit": "client", **PRIVACY}, **given)  # type: ignore[arg-type]


def test_an_experiment_with_privacy_is_read_again_as_it_was_written() -> None:
    experiment = Experiment(privacy={"unit": "client", **PRIVACY}, evaluate={"clients": "none"})  # type: ignore[arg-type]
    assert Experiment.model_validate(experiment.model_dump()) == experiment
