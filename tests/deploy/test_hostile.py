"""A server that tries to read a node's data, files or columns: all that it gets are codes and counts."""

import os

import pytest

from fedlora.config.policy import Policy
from fedlora.deploy import node_run
from fedlora.deploy.reasons import Reason
from fedlora.deploy.wire import (
    ClientRecord,
    ClientTask,
    HandshakeReply,
    Rejected,
    RoundRecord,
    TaskRequest,
    decode_message,
)
from fedlora.rounds.codec import encode
from fedlora.train import local
from hostile import Owner, furnish, reason_of, silent, trained

from tiny import LABELS


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("home"))


HOSTILE = {
    "the text as the label": {"data": {"source": "none", "labels": ["a", "b"], "label": "text"}, "labels": ["a", "b"]},
    "labels that the file does not have": {"labels": ["a", "b"]},
    "a model in a folder": {"model": "/etc"},
    "a model outside its package": {"model": "package:torch/../../../etc"},
    "a model that is not there": {"model": "package:no_such_package/model"},
    "a device that is not there": {"train": {"device": "cuda:77"}},
    "pairs of texts": {"data": {"source": "none", "labels": list(LABELS), "text_pair": "diagnosis"}},
    "modules that are not there": {"lora": {"targets": "nothing"}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_experiment_is_answered_with_a_code_and_its_reason_is_told_to_the_owner(home, tmp_path, name):
    owner = Owner(home, tmp_path / "node", overrides=[] if "model" in HOSTILE[name] else [f"model={home / 'bert'}"])
    result = owner.handshake(home, **HOSTILE[name])
    assert isinstance(result, Rejected) and result.failure.reason in Reason
    assert silent(owner.raw)
    assert owner.told and len(owner.told[-1]) > len(result.failure.reason.value)


def test_columns_that_the_server_names_are_not_read(home, tmp_path):
    owner = Owner(home, tmp_path / "node")
    table = {"data": {"source": "none", "labels": list(LABELS), "text": "diagnosis", "label": "no such column"}}
    assert isinstance(owner.handshake(home, **table), HandshakeReply)


def test_columns_are_those_that_the_node_names(home, tmp_path):
    owner = Owner(home, tmp_path / "node", overrides=[f"model={home / 'bert'}", "data.text=no such column"])
    result = owner.handshake(home)
    assert isinstance(result, Rejected) and result.failure.reason is Reason.DATA and silent(owner.raw)
    assert "no such column" in owner.told[-1] and "diagnosis" in owner.told[-1]


def test_a_file_that_only_the_server_names_is_not_read_by_a_node_without_a_file(home, tmp_path):
    source = {"data": {"source": str(home / "clinic.jsonl")}, "clients": {"count": 1, "partition": "iid"}}
    owner = Owner(home, tmp_path / "node", data=None)
    result = owner.handshake(home, **source)
    assert isinstance(result, Rejected) and result.failure.reason is Reason.EXPERIMENT and silent(owner.raw)
    assert "--set data.source=" in owner.told[-1]


@pytest.mark.parametrize("name", ["of another run", "garbage", "for another client", "without payloads", "base updates"])
def test_a_hostile_order_is_answered_with_a_code(home, tmp_path, name):
    owner = Owner(home, tmp_path / "node")
    present = owner.handshake(home)
    client = present.clients[0]
    stranger = ClientRecord(id="other", rank=2, examples=7)
    request = {
        "of another run": ({"run": "../../etc"}, client, [encode({})]),
        "garbage": ({}, client, [os.urandom(200)]),
        "for another client": ({}, stranger, [encode({})]),
        "without payloads": ({}, client, []),
        "base updates": ({"expected_base_updates": [3, 4]}, client, [encode({})]),
    }
    change, client, payloads = request[name]
    table = {
        "kind": "train",
        "run": "r",
        "round_record": RoundRecord(index=0, seed=0, attempt=0),
        "expected_base_updates": [],
        **change,
    }
    result = owner.ask(TaskRequest(**table, tasks=[ClientTask(client=client, download=0)]), payloads)
    failure = result.failure if isinstance(result, Rejected) else result.results[0].failure
    assert failure is not None and silent(owner.raw)
    assert name != "base updates" or (failure.reason is Reason.BASE_UPDATES and failure.count == 2)


@pytest.mark.parametrize("message", [b"", b"fedlora\x01" + bytes(40), os.urandom(300)])
def test_a_message_that_is_none_is_answered_with_a_code(home, tmp_path, message):
    owner = Owner(home, tmp_path / "node")
    result = decode_message(owner.node.reply(message), 1)[0]
    assert isinstance(result, Rejected) and result.failure.reason is Reason.MESSAGE
    assert len(owner.told) == 1


def test_an_experiment_that_the_policy_does_not_allow_is_refused_with_a_code_before_anything_is_loaded(
    home, tmp_path, monkeypatch
):
    monkeypatch.setattr(node_run.FederatedData, "of_client", None)
    owner = Owner(home, tmp_path / "node", policy=Policy(methods=["ffa-lora"], columns=["text"]))
    result = owner.handshake(home)
    assert isinstance(result, Rejected) and result.failure.reason is Reason.METHOD and silent(owner.raw)
    assert len(owner.told) == 2 and "policy.columns allows text" in owner.told[1]


def test_a_run_that_nobody_has_accepted_is_refused_with_a_code(home, tmp_path):
    owner = Owner(home, tmp_path / "node", accept=False)
    result = owner.handshake(home)
    assert isinstance(result, Rejected) and result.failure.reason is Reason.TERMS


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"traffic": {"round_mb_down": 1e-6}}, Reason.TRAFFIC),
        ({"traffic": {"round_mb_up": 1e-6}}, Reason.TRAFFIC),
        ({"traffic": {"run_mb": 1e-6}}, Reason.TRAFFIC),
        ({"cohort": 2}, Reason.COHORT),
    ],
)
def test_a_round_beyond_a_limit_is_refused_before_its_training(home, tmp_path, monkeypatch, limits, reason):
    owner = Owner(home, tmp_path / "node", policy=Policy(**limits))
    monkeypatch.setattr(local.LocalTrainer, "fit", lambda *_: pytest.fail("trained"))
    assert isinstance(owner.handshake(home, rounds=2, sampling={"min_replies": 2}), HandshakeReply)
    assert reason_of(trained(owner)) is reason


def test_a_round_that_the_accepted_experiment_does_not_have_is_refused(home, tmp_path, monkeypatch):
    owner = Owner(home, tmp_path / "node")
    monkeypatch.setattr(local.LocalTrainer, "fit", lambda *_: pytest.fail("trained"))
    owner.handshake(home, rounds=2)
    assert reason_of(trained(owner, 2)) is Reason.ROUNDS


def test_trainings_are_counted_also_if_a_round_is_repeated_and_the_node_restarts(home, tmp_path):
    owner = Owner(home, tmp_path / "node", policy=Policy(rounds=2))
    owner.handshake(home, rounds=2)
    assert reason_of(trained(owner)) is None and reason_of(trained(owner, attempt=1)) is None
    owner.stop()
    owner = Owner(home, tmp_path / "node", policy=Policy(rounds=2))
    assert isinstance(owner.handshake(home, rounds=2), HandshakeReply)
    assert reason_of(trained(owner, 1)) is Reason.ROUNDS
