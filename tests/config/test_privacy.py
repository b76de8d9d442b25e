"""The section `privacy`."""

from typing import Any

import pytest

from fedlora.config.experiment import Experiment
from fedlora.errors import UserError


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"unit": "record", "delta": 1e-5}, "privacy needs either privacy.noise_multiplier or privacy.epsilon"),
        ({"epsilon": 8.0}, "privacy.epsilon needs privacy.unit = 'record' or 'client'"),
        (
            {"unit": "records"},
            "privacy.unit = 'records': Input should be 'none', 'record' or 'client'; did you mean 'record'?",
        ),
        ({"unit": "x"}, "privacy.unit = 'x': Input should be 'none', 'record' or 'client'"),
    ],
)
def test_a_message_names_the_section_and_the_allowed_values_once(section: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as rejected:
        Experiment(privacy=section)  # type: ignore[arg-type]
    assert str(rejected.value) == message


def test_by_default_there_is_no_privacy() -> None:
    assert Experiment().privacy.unit == "none"


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"epsilon": 8.0}, "privacy.epsilon needs privacy.unit"),
        ({"unit": "record", "delta": 1e-5}, "either privacy.noise_multiplier or privacy.epsilon"),
        (
            {"unit": "record", "delta": 1e-5, "epsilon": 1.0, "noise_multiplier": 1.0},
            "either privacy.noise_multiplier or privacy.epsilon",
        ),
        ({"unit": "record", "epsilon": 8.0}, "privacy.delta"),
        ({"unit": "client", "epsilon": 8.0, "delta": 1e-4, "participations": 3}, "privacy.participations needs"),
        ({"unit": "client", "epsilon": 8.0, "delta": 1e-4, "public_counts": True}, "privacy.public_counts needs"),
        ({"unit": "record", "epsilon": 8.0, "delta": 1e-4, "clip_quantile": 0.5}, "privacy.clip_quantile needs"),
        ({"unit": "client", "epsilon": 8.0, "delta": 1e-4, "clip_rate": 0.5}, "privacy.clip_rate needs"),
        ({"unit": "record", "epsilon": 8.0, "delta": 1e-4, "largest_cohort": 5}, "privacy.largest_cohort needs"),
        ({"largest_cohort": 5}, "privacy.largest_cohort needs privacy.unit"),
        ({"unit": "client", "epsilon": 8.0, "delta": 1.0}, "privacy.delta"),
        ({"unit": "client", "epsilon": 0.0, "delta": 1e-4}, "privacy.epsilon"),
        ({"unit": "client", "epsilon": 1.0, "delta": 1e-4, "clip": 0.0}, "privacy.clip"),
        ({"unit": "record", "epsilon": 1.0, "delta": 1e-4, "clip": 1e-7}, "privacy.clip .*at least 1e-06"),
    ],
)
def test_an_incomplete_or_inconsistent_section_is_rejected(section: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        Experiment(privacy=section)  # type: ignore[arg-type]
