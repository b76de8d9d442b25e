"""A deployment with client-level privacy, over a transport within this process."""

import json
import math

import pytest
import torch
from test_node import Hand, decode_message, make_nodes

from fedlora.api import export
from fedlora.config.experiment import build
from fedlora.deploy.launch import prepare
from fedlora.deploy.node import Node
from fedlora.deploy.server import serve
from fedlora.deploy.settings import Settings
from fedlora.deploy.wire import Done, HandshakeReply
from fedlora.errors import UserError
from fedlora.privacy.account import epsilon
from fedlora.privacy.events import Gaussian, Truncation
from fedlora.privacy.statement import OF_NODES

from wired import furnish, known, problem


def test_the_account_of_a_largest_cohort_is_that_of_the_planned_number_of_clients(tmp_path, monkeypatch):
    """Four clients with files of their own connect to a run that was planned for three."""
    home = furnish(tmp_path)
    privacy = {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-4, "clip": 0.1, "largest_cohort": 2}
    more = {"rounds": 2, "evaluate": {"clients": "none"}, "sampling": {"fraction": 0.5}}
    folder, names = tmp_path / "run", ["a", "b", "c", "d"]
    method = {"name": "lora-a2", "rank": 2, "shared_rank": 1}
    prepare(build({**problem(home, privacy=privacy, **more), "method": method}, ["clients.count=3"]), folder)
    for name in names:
        own = {"data": str(home / "rows.jsonl"), "overrides": [f"model={home / 'bert'}"], "accept": True}
        Settings(clients=[name], **own).write(tmp_path / name)
    hand = Hand({i + 1: Node(tmp_path / name) for i, name in enumerate(names)})
    serve(folder, hand)
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()][1:]
    assert len(lines) == 2
    for done, line in enumerate(lines, 1):
        assert line["privacy"]["epsilon"] == epsilon([Gaussian(1.0, 0.5, done, Truncation(2, 3))], 1e-4)
        assert len(line["chosen"]) <= 2 and set(line["chosen"]) <= {"a", "b", "c"}
    card = (folder / "adapter" / "README.md").read_text()
    assert "n = 3 clients" in card and "from the operating system, and secret" in card
    export(folder, "adapter", tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == card
    monkeypatch.setattr("fedlora.run_exports.statement_text", lambda *_: None)  # as for rounds of an earlier version
    with pytest.raises(UserError, match="no round with the number of clients"):
        export(folder, "adapter", tmp_path / "without")


def test_nodes_send_no_counts_and_no_losses_and_the_noise_of_a_server_is_secret(tmp_path):
    privacy = {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-4, "clip": 0.1}
    more = {"rounds": 2, "evaluate": {"clients": "none"}, "sampling": {"fraction": 0.5}}
    what, states = build(problem(furnish(tmp_path), privacy=privacy, **more)), []
    for name in ("one", "other"):
        folder = tmp_path / name
        prepare(what, folder)
        hand = Hand(make_nodes(what, tmp_path / f"nodes of {name}"))
        serve(folder, hand)
        states.append(known(folder))
        sent = [decode_message(reply)[0] for _, _, reply in hand.carried]
        assert {client.examples for one in sent if isinstance(one, HandshakeReply) for client in one.clients} == {1}
        results = [result for one in sent if isinstance(one, Done) for result in one.results]
        assert all((one.weight, one.steps, one.examples) == (1.0, 0, 0) and math.isnan(one.loss) for one in results)
        lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
        assert [line["privacy"]["noise_multiplier"] for line in lines[1:]] == [1.0] * 2
    assert any(isinstance(x, torch.Tensor) and not torch.equal(x, states[1][key]) for key, x in states[0].items())


def test_an_export_of_a_deployed_run_with_privacy_for_records_has_the_statement_of_the_run(tmp_path):
    privacy = {"unit": "record", "noise_multiplier": 1.0, "delta": 1e-4, "clip": 0.1}
    what, folder = build(problem(furnish(tmp_path), privacy=privacy, evaluate={"clients": "none"})), tmp_path / "run"
    prepare(what, folder)
    serve(folder, Hand(make_nodes(what, tmp_path / "nodes")))
    export(folder, "adapter", tmp_path / "out")
    own, exported = ((path / "README.md").read_text() for path in (folder / "adapter", tmp_path / "out"))
    assert OF_NODES in own and exported == own
