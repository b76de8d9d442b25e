"""Which guarantees of differential privacy the pages of the methods name."""

import json
import re

import pytest

from fedlora import Experiment
from fedlora.errors import UserError
from fedlora.methods.table import TABLE
from fedlora.privacy.release import leaving
from fedlora.report.guarantees import guarantee


def refused(unit, name, settings=(), ranks=None):
    """The reason for which an experiment with the method is refused; None if it is not."""
    privacy = {"unit": unit, "noise_multiplier": 1.0, "delta": 1e-5}
    method = {"name": name, **dict(settings)}
    try:
        leaving(Experiment(method=method, privacy=privacy, evaluate={"clients": "none"}, clients={"ranks": ranks}))
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("unit", ["record", "client"])
@pytest.mark.parametrize("name", TABLE)
def test_a_page_names_the_guarantees_that_an_experiment_may_have(name, unit):
    told = guarantee(TABLE[name], unit)
    answer, _, reason = told.partition(": ")
    settings = [{key: json.loads(value or "1")} for key, value in re.findall(r"`(\w+)(?: = (.*?))?`", told)]
    assert (refused(unit, name) is None) == (answer.startswith("yes") and not settings)
    if answer == "no":
        assert f": {reason}; " in refused(unit, name)
        return
    for changed in settings or [{}]:
        assert refused(unit, name, changed) is None
        if TABLE[name].mixed_ranks:
            assert (refused(unit, name, changed, "uniform") is None) == ("equal ranks" not in told)


def test_methods_with_choices_or_weights_by_data_support_records_only():
    for name in ("hetlora", "flasc", "florg", "fedlease", "local-only"):
        assert guarantee(TABLE[name], "record") == "yes" and guarantee(TABLE[name], "client").startswith("no: ")
    assert guarantee(TABLE["ce-lora"], "record") == "yes, with `data_weight = 0.0`"
    assert guarantee(TABLE["lora-a2"], "client") == 'yes, with `upload = "all"` or `shared_rank`'
