"""Whole runs with client-level privacy."""

import pytest

from fedlora import api
from fedlora.config.experiment import build
from fedlora.errors import UserError
from fedlora.privacy.account import epsilon
from fedlora.privacy.events import Gaussian, Truncation
from fedlora.rounds.progress import NullProgress

from wired import assert_same_runs, furnish, problem

PRIVACY = {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-4, "clip": 0.1}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("home"))


def experiment(home, shared_rank=None, **privacy):
    method = (
        {"name": "fedit", "rank": 2} if shared_rank is None else {"name": "lora-a2", "rank": 2, "shared_rank": shared_rank}
    )
    more = {"privacy": {**PRIVACY, **privacy}, "evaluate": {"clients": "none"}, "sampling": {"fraction": 0.5}}
    return build({**problem(home, **more), "method": method})


class Interrupting(NullProgress):
    """Interrupts the run in its second round."""

    def round_started(self, rnd, chosen):
        if rnd.index == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("largest", "shared_rank"), [(None, None), (2, 1)])
def test_a_resumed_run_is_the_undisturbed_run_and_spends_as_much(home, tmp_path, largest, shared_rank):
    what = experiment(home, shared_rank, largest_cohort=largest)
    api.run(what, tmp_path / "whole", False)
    with pytest.raises(KeyboardInterrupt):
        api.run(what, tmp_path / "resumed", Interrupting())
    rows = api.resume(tmp_path / "resumed", False).rows
    assert_same_runs(tmp_path / "whole", tmp_path / "resumed")
    for row in rows[1:]:
        limit = None if largest is None else Truncation(largest, 4)
        assert row.privacy.epsilon == epsilon([Gaussian(1.0, 0.5, row.round, limit)], 1e-4)
        assert largest is None or len(row.chosen) <= largest


def test_noise_for_an_epsilon_holds_for_the_rounds_of_the_run_which_cannot_be_increased(home, tmp_path):
    rows = api.run(experiment(home, epsilon=4.0, noise_multiplier=None), tmp_path / "run", False).rows
    assert 3.9 < rows[-1].privacy.epsilon <= 4.0
    with pytest.raises(UserError, match=r"rounds = 5, in the run it is 3; it cannot be increased with privacy.epsilon = 4"):
        api.resume(tmp_path / "run", False, ["rounds=5"])
