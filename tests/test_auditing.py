"""Audits of experiments: training on canaries is noticed, and their data are what they claim to be."""

import json
import math

import pytest
import torch

from fedlora import Experiment, UserError
from fedlora.auditing import ExperimentAudit, audit
from fedlora.canaries import client_canaries, example_canaries
from fedlora.federated_data import FederatedData
from fedlora.planning import client_sizes, plan_of
from fedlora.privacy.audit import Audit
from tiny_tasks import tiny_task


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    found = tiny_task("classification", tmp_path_factory.mktemp("audit") / "texts")
    found["data"]["test"] = found["data"]["source"]  # so that no row is drawn from the others
    clients = {"count": 2, "partition": "iid", "held_out": 0.0}
    train = {"lr": 0.01, "max_steps": 1, "batch_size": 16, "max_length": 32, "device": "cpu"}
    return {**found, "rounds": 2, "clients": clients, "method": {"name": "fedit", "rank": 8}, "train": train}


def made(settings, **changes):
    return Experiment.model_validate({**settings, **changes})


def test_training_without_privacy_is_noticed(settings):
    data, train = {**settings["data"], "rows": 8}, {**settings["train"], "max_steps": 80}
    found = audit(made(settings, data=data, method={"name": "fedit", "rank": 16}, train=train), 60, 12)
    assert found.claimed == math.inf and not found.exceeds
    assert 0.5 < found.found.bound <= found.found.ceiling


def test_without_learning_there_is_nothing_to_notice(settings):
    found = audit(made(settings, train={**settings["train"], "lr": 1e-30}), 60, 12)
    assert found.found.bound == 0.0


def test_canaries_can_be_clients(settings):
    privacy = {"unit": "client", "noise_multiplier": 0.0, "delta": 1e-5}
    found = audit(made(settings, privacy=privacy, evaluate={"clients": "none"}), 10, 2)
    assert found.unit == "client" and (found.found.canaries, found.found.guesses) == (10, 4)


def test_examples_as_canaries_are_added_to_one_client_by_their_coins(settings):
    experiment = made(settings)
    before = FederatedData.make(experiment)
    planted = example_canaries(experiment, before, 30)
    changed, other = sorted(planted.data.partition.shares, key=lambda share: share.client != planted.client.id)
    added = set(changed.train) - {row for share in before.partition.shares for row in share.train}
    assert added == {row for (row,), is_in in zip(planted.rows, planted.included.tolist(), strict=True) if is_in}
    assert other in before.partition.shares and planted.client.examples == len(changed.train)
    train = planted.data.labelled_data.train
    assert len(train) == len(before.labelled_data.train) + 30
    assert train.select(range(len(before.labelled_data.train))).to_list() == before.labelled_data.train.to_list()
    new = train.select(range(len(before.labelled_data.train), len(train)))
    assert len(set(new["text"])) == 30 and set(new["label"]) == {0, 1, 2}


def test_clients_as_canaries_have_rows_of_their_own(settings):
    experiment = made(settings)
    planted = client_canaries(experiment, FederatedData.make(experiment), 12)
    shares = planted.data.partition.shares
    assert [share.client for share in shares] == [client.id for client in planted.data.clients]
    assert len(shares) == 2 + int(planted.included.sum())
    rows = [row for share in shares for row in share.train]
    assert len(rows) == len(set(rows)) and {len(own) for own in planted.rows} == {24}
    excluded = [row for own, is_in in zip(planted.rows, planted.included, strict=True) if not is_in for row in own]
    assert not set(excluded) & set(rows)


def test_the_claimed_epsilon_is_that_of_the_plan_but_for_the_canaries(settings):
    privacy = {"unit": "record", "noise_multiplier": 1.0, "delta": 1e-5}
    experiment = made(settings, privacy=privacy, evaluate={"clients": "none"})
    told = []
    found = audit(experiment, 10, 2, notify=told.append)
    plan = plan_of(experiment, client_sizes(experiment))
    assert found.planned == plan.worst().epsilon(1e-5)
    planted = example_canaries(experiment, FederatedData.make(experiment), 10)
    (one,) = plan_of(experiment, {"": planted.client.examples}).mechanisms
    assert found.claimed == one.epsilon(1e-5) != found.planned
    assert f"({found.planned:.4g} for the experiment without)" in found.text()
    assert not found.can_exceed and told[-1] in found.text() and "cannot contradict the claimed epsilon" in told[-1]
    of_clients = {**privacy, "unit": "client"}
    found = audit(made(settings, privacy=of_clients, evaluate={"clients": "none"}), 10, 2)
    assert found.claimed == found.planned and "for the experiment" not in found.text()


def test_an_audit_says_whether_it_can_contradict_its_claim():
    for claim, can in ((2.0, True), (4.0, False), (math.inf, False)):
        found = ExperimentAudit("record", Audit(100, 100, 50, 0.0), claim, claim)
        assert found.can_exceed == can == json.loads(found.to_json())["can_exceed"]
        assert ("cannot contradict" in found.text()) == (claim == 4.0)


def test_what_cannot_be_audited_is_rejected(settings, tmp_path):
    with pytest.raises(UserError, match="expected 1 to 5 guesses on each side for 10 canaries, found 6"):
        audit(made(settings), 10, 6)
    tagging = tiny_task("tagging", tmp_path / "tagging")
    with pytest.raises(UserError, match="found 'tokens' of kind 'texts'"):
        audit(made({**settings, **tagging}), 10, 2)


def test_a_bound_above_the_claim_is_a_contradiction():
    found = ExperimentAudit("record", Audit(100, 100, 100, 0.0), 3.0, 3.0)
    assert found.exceeds and "claimed epsilon 3, at" in found.text()
    assert json.loads(found.to_json())["bound"] == pytest.approx(3.493, abs=1e-3)
    without = ExperimentAudit("record", Audit(100, 100, 100, 0.0), math.inf, math.inf)
    assert not without.exceeds and json.loads(without.to_json())["claimed"] is None
    assert torch.isfinite(torch.tensor(without.found.ceiling))
