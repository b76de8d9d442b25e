"""What leaves a client, and by which rule."""

from dataclasses import fields, is_dataclass

import pytest
from pydantic import BaseModel

from fedlora import messages
from fedlora.config.experiment import Experiment
from fedlora.deploy import wire
from fedlora.errors import UserError
from fedlora.methods.table import TABLE
from fedlora.privacy.release import FIELDS, leaving

FROM_THE_SERVER = {"Handshake", "ClientTask", "AcknowledgedRecord", "TaskRequest", "Notice"}
SHARED = {"RoundRecord"}
"""The record of a round that a node repeats."""


def experiment(unit, name="fedit", privacy=(), method=(), **more):
    section = {} if unit == "none" else {"unit": unit, "noise_multiplier": 1.0, "delta": 1e-5, **dict(privacy)}
    return Experiment(privacy=section, evaluate={"clients": "none"}, method={"name": name, **dict(method)}, **more)


def released(*given, **more):
    return leaving(experiment(*given, **more))


def test_every_field_that_a_client_or_its_node_can_send_has_a_rule():
    """A new field of a message needs a rule: is it covered by the guarantee, fixed, or not sent?"""
    sent = {kind.__name__: kind for kind in (messages.Upload, messages.Reply, messages.ClientInfo, messages.Statistics)}
    parts = {kind.__name__: kind for kind in wire._Part.__subclasses__() if not kind.__name__.startswith("_")}
    sent |= {name: kind for name, kind in parts.items() if name not in FROM_THE_SERVER | SHARED}
    assert FIELDS.keys() == sent.keys()
    for name, kind in sent.items():
        assert is_dataclass(kind) or issubclass(kind, BaseModel)
        found = {field.name for field in fields(kind)} if is_dataclass(kind) else kind.model_fields.keys()
        assert FIELDS[name].keys() == found, name
    for unit in ("record", "client"):
        assert {key for rules in FIELDS.values() for key in rules.values()} <= released(unit).keys()


def test_without_privacy_there_is_nothing_to_say():
    assert released("none") == {}


@pytest.mark.parametrize(
    ("unit", "guarantee"), [("record", "DP-SGD on the client"), ("client", "the server clips the change")]
)
def test_values_are_covered_and_all_else_is_fixed_or_not_sent(unit, guarantee):
    found = released(unit)
    assert found["values"].what == "values of the upload (a, b, head)" and guarantee in found["values"].rule
    assert found["examples"].rule == "fixed: 1, for each client"
    assert found["training"].rule == "not sent" and found["scores"].rule.startswith("not sent")


def test_public_numbers_of_examples_are_named_as_such():
    assert released("record", privacy={"public_counts": True})["examples"].rule == "public: privacy.public_counts"


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("hetlora", {}, "the server needs each client's upload"),
        ("flexlora", {}, r"only their mean; set method.upload = \"dense\""),
        ("flasc", {}, r"a client's choice \(positions\) depends on its data"),
        (
            "lora-a2",
            {},
            r"positions\) depends on its data, without noise; set method.upload = \"all\", or set method.shared_rank, or",
        ),
        ("local-only", {}, "nothing is uploaded"),
    ],
)
def test_privacy_of_clients_refuses_methods_whose_uploads_it_cannot_cover(name, settings, reason):
    with pytest.raises(UserError, match=f"privacy.unit = 'client' is not supported by {name} .*{reason}"):
        released("client", name, method=settings)


@pytest.mark.parametrize(("name", "settings"), [("ravan", {}), ("flexlora", {"upload": "dense"})])
def test_privacy_of_clients_refuses_clients_that_start_from_different_values(name, settings):
    assert released("client", name, method=settings)
    with pytest.raises(UserError, match=r"start from different values.*; remove clients\.ranks"):
        released("client", name, method=settings, clients={"ranks": "uniform"})


@pytest.mark.parametrize(
    ("name", "settings"), [("fslora", {}), ("lora-a2", {"upload": "all"}), ("lora-a2", {"shared_rank": 3})]
)
def test_privacy_of_clients_allows_different_ranks_where_all_clients_send_the_same_ranks(name, settings):
    found = released("client", name, method=settings, clients={"ranks": "uniform"})
    assert found["choices"].rule == "nothing to cover"


def test_privacy_of_records_allows_choices_by_trained_tensors():
    assert "positions" in released("record", "lora-a2")["choices"].what
    assert "have noise" in released("record", "flasc")["choices"].rule
    assert released("record", "lora-a2", method={"shared_rank": 3})["choices"].rule == "nothing to cover"


@pytest.mark.parametrize(
    ("name", "settings", "noun"),
    [("ravan", {"choose": "gradient"}, "a gradient"), ("ce-lora", {}, "features")],
)
def test_privacy_of_records_refuses_methods_that_read_examples_without_noise(name, settings, noun):
    """Also where all clients of the settings have the same rank: a node may join with a smaller one."""
    for ranks in ({}, {"clients": {"ranks": "uniform"}}) if TABLE[name].mixed_ranks else ({},):
        with pytest.raises(
            UserError, match=f"privacy.unit = 'record' is not supported by {name} .*needs {noun} of its examples"
        ):
            released("record", name, method=settings, **ranks)
