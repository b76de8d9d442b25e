"""`[[wrap]]`: wrappers by name, in order, each once."""

import pytest

from fedlora.config.experiment import Experiment, build
from fedlora.errors import UserError
from fedlora.methods.averaging import FactorAveraging
from fedlora.methods.wrap.fedprox import FedProx


def test_a_listed_wrapper_wraps_the_method_with_its_settings():
    (choice,) = build({"wrap": [{"name": "fedprox", "mu": 0.5}]}).wrap
    assert choice.around(FactorAveraging(rank=3)) == FedProx(FactorAveraging(rank=3), mu=0.5)


@pytest.mark.parametrize("entries", [[], [{"name": "fedprox"}], [{"name": "fedprox", "mu": 0.3}]])
def test_set_changes_a_wrapper_by_its_name_or_adds_it(entries):
    assert build({"wrap": entries}, ["wrap.fedprox.mu=0.1"]).wrap == build({"wrap": [{"name": "fedprox", "mu": 0.1}]}).wrap


def test_a_saved_experiment_has_the_wrapper_with_its_defaults(tmp_path):
    experiment = build({"wrap": [{"name": "fedprox"}]})
    (tmp_path / "e.toml").write_text(experiment.to_toml(), encoding="utf-8")
    assert "mu = 0.01" in experiment.to_toml() and Experiment.load(tmp_path / "e.toml") == experiment


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"name": "fedprx"}], "unknown wrapper 'fedprx'; did you mean 'fedprox'?"),
        ([{"name": "fedprox", "nu": 1.0}], "fedprox has no setting 'nu'; allowed: mu"),
        ([{"name": "fedprox", "mu": -1.0}], "wrap.fedprox.mu = -1.0: expected a finite number of at least 0"),
        ([{"name": "fedprox"}, {"name": "fedprox"}], "fedprox is listed twice"),
        ([{"mu": 1.0}], "wrap.0.name"),
        ("fedprox", "wrap"),
    ],
)
def test_an_invalid_wrapper_is_named_with_what_is_allowed(entries, message):
    with pytest.raises(UserError) as error:
        build({"wrap": entries})
    assert message in str(error.value) and "\n" not in str(error.value)
