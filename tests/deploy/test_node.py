"""The node and the backend in one process: all but Flower itself."""

import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import pytest
import torch

from fedlora.api import export, run
from fedlora.config.experiment import build
from fedlora.config.policy import Policy, PrivacyLimits
from fedlora.deploy import launch as deploy
from fedlora.deploy import server, wire
from fedlora.deploy.admission import NodeAdmission
from fedlora.deploy.backend import FlowerBackend
from fedlora.deploy.credential import Credential
from fedlora.deploy.node import Node
from fedlora.deploy.privacy_ledger import PrivacyLedger, default_folder
from fedlora.deploy.reasons import Reason
from fedlora.deploy.scores import ScoreCheck
from fedlora.deploy.settings import Settings
from fedlora.deploy.wire import (
    PROTOCOL,
    Batch,
    ClientRecord,
    Done,
    Failure,
    Handshake,
    HandshakeReply,
    Rejected,
    TaskRequest,
    encode_message,
)
from fedlora.deploy.wire import decode_message as decode_for
from fedlora.errors import RunStopped, UserError
from fedlora.federated_data import FederatedData
from fedlora.lifecycle import begin, rounds
from fedlora.models.weights_digest import weights_digest
from fedlora.rounds.codec import decode, encode
from fedlora.rounds.finite import NOT_FINITE
from fedlora.rounds.progress import NullProgress
from fedlora.runs.folder import RunFolder
from fedlora.session import Session
from fedlora.train import local
from fedlora.version import __version__
from tiers import fast

from tiny import LABELS, tiny_rows
from wired import CLIENTS, assert_same_runs, furnish, known, problem, rows_of


def decode_message(message):
    return decode_for(message, 100)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("home"))


def experiment(home, method="fedit", *overrides, **more):
    return build(problem(home, method, **more), overrides)


@dataclass
class Hand:
    """A transport within the process; `spoil` may change a reply, and nodes may be disconnected."""

    nodes_by_number: dict[int, Node]
    spoil: object = None
    away: set[int] = field(default_factory=set)
    results: dict[str, bytes | str] = field(default_factory=dict)
    carried: list[tuple[int, bytes, bytes]] = field(default_factory=list)
    credentials: Mapping[int, Credential] | None = None

    def nodes(self) -> Collection[int]:
        return self.nodes_by_number.keys() - self.away

    def credential(self, node: int) -> Credential | None:
        return None if self.credentials is None else self.credentials[node]

    def send(self, messages: Mapping[int, bytes], seconds: float) -> dict[str, int]:
        message_ids = {}
        for flower_id, message in messages.items():
            message_id = f"{len(self.carried)}"
            result = self.nodes_by_number[flower_id].reply(message)
            self.carried.append((flower_id, message, result))
            if self.spoil is not None:
                result = self.spoil(flower_id, message, result)
            if result is not None:
                self.results[message_id] = result
            message_ids[message_id] = flower_id
        return message_ids

    def collect(self, message_ids: Collection[str]) -> Mapping[str, bytes | str]:
        return {message_id: self.results.pop(message_id) for message_id in list(message_ids) if message_id in self.results}


def make_nodes(what, folder, groups=(CLIENTS[:2], CLIENTS[2:])):
    nodes = {}
    for i, clients in enumerate(groups):
        Settings.trusting(what, clients).write(folder / f"node{i}")
        nodes[i + 1] = Node(folder / f"node{i}")
    return nodes


def serve(what, folder, hand, server_session_id="1", count=4, said=None):
    """Runs the remaining rounds of the folder over the transport."""
    folder.mkdir(exist_ok=True)
    lock = RunFolder(folder)
    try:
        session = Session.make(what, FederatedData.of_server(what))
        start = begin(session, lock)
        remote = make_remote(what, session, hand, server_session_id, start.done, said)
        remote.wait_for_clients(count, 0.0)  # the nodes reply at once
        return rounds(session, lock, NullProgress(), remote, start, deployed=True)
    finally:
        lock.release()


def make_remote(what, session, hand, server_session_id="1", done=0, said=None):
    handshake = Handshake(
        protocol=PROTOCOL,
        version=__version__,
        run="r",
        experiment=what.to_toml(),
        labels=list(session.federated_data.labelled_data.labels),
        server_session_id=server_session_id,
        done=done,
    )
    row = what.method.row
    admission = NodeAdmission(weights_digest(session.adapted.model), what.method.rank, row.mixed_ranks)
    lines = [] if said is None else said
    empty = session.task.no_statistics(session.federated_data.labelled_data.labels)
    check = ScoreCheck(empty, session.task.check, what.clients.held_out)
    return FlowerBackend(
        hand, handshake, admission, session.trainer, check, what.deploy.deadline, what.deploy.poll, lines.append
    )


@pytest.mark.parametrize("method", fast(["fedit", "fedsa-lora", "flora", "ce-lora"], "flora"))
def test_over_the_wire_a_run_is_bit_for_bit_the_simulated_one(home, tmp_path, method):
    what = experiment(home, method)
    run(what, tmp_path / "simulated")
    serve(what, tmp_path / "served", Hand(make_nodes(what, tmp_path)))
    assert_same_runs(tmp_path / "simulated", tmp_path / "served")


@pytest.mark.parametrize("method", fast(["rolora", "fedsa-lora"], "rolora"))
def test_over_the_wire_a_run_with_dora_is_bit_for_bit_the_simulated_one(home, tmp_path, method):
    what = experiment(home, method, "lora.dora=true", "rounds=2")
    run(what, tmp_path / "simulated")
    serve(what, tmp_path / "served", Hand(make_nodes(what, tmp_path)))
    assert_same_runs(tmp_path / "simulated", tmp_path / "served")


def test_over_the_wire_a_run_stops_where_the_simulated_one_does(home, tmp_path):
    what = experiment(home, "fedit", "evaluate.stop_after=1", "train.lr=0.1", "rounds=5", "clients.held_out=0.3")
    run(what, tmp_path / "simulated")
    serve(what, tmp_path / "served", Hand(make_nodes(what, tmp_path)))
    assert_same_runs(tmp_path / "simulated", tmp_path / "served")
    assert len(rows_of(tmp_path / "served")) < 6 and rows_of(tmp_path / "served")[-1].best_round is not None


@pytest.mark.parametrize("method", fast(["fedit", "lora-a2", "flora"], "flora"))
def test_a_node_with_all_clients_trains_them_together_bit_for_bit_as_the_simulator_does(home, tmp_path, method):
    what = experiment(home, method, "train.clients_per_step=4")
    run(what, tmp_path / "simulated")
    serve(what, tmp_path / "served", Hand(make_nodes(what, tmp_path, (CLIENTS,))))
    assert_same_runs(tmp_path / "simulated", tmp_path / "served")


@pytest.mark.slow
def test_nodes_of_one_client_each_give_the_bits_of_clients_trained_one_by_one(home, tmp_path):
    run(experiment(home, "flora", "train.clients_per_step=1"), tmp_path / "simulated")
    what = experiment(home, "flora", "train.clients_per_step=4")
    hand = Hand(make_nodes(what, tmp_path, [[client] for client in CLIENTS]))
    serve(what, tmp_path / "served", hand)
    assert_same_runs(tmp_path / "simulated", tmp_path / "served")


@pytest.mark.slow
def test_other_groups_on_nodes_than_in_the_simulator_change_only_the_rounding(home, tmp_path):
    what = experiment(home, "flora", "train.clients_per_step=4")
    run(what, tmp_path / "simulated")
    serve(what, tmp_path / "served", Hand(make_nodes(what, tmp_path, (CLIENTS[:3], CLIENTS[3:]))))
    one, other = known(tmp_path / "simulated"), known(tmp_path / "served")
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5)


def test_a_node_trains_and_evaluates_its_clients_in_one_step(home, tmp_path, monkeypatch):
    sizes = {"train_together": [], "score": []}
    for name, of in (("train_together", 3), ("score", 3)):
        monkeypatch.setattr(local, name, counted(getattr(local, name), sizes[name], of))
    what = experiment(home, "fedit", "train.clients_per_step=4", rounds=1)
    serve(what, tmp_path / "run", Hand(make_nodes(what, tmp_path, (CLIENTS[:3], CLIENTS[3:]))))
    assert sizes["train_together"] == [3, 1]
    assert sizes["score"] == [3, 1] * 2  # before and after training


def counted(function, sizes, place):
    """The function, which notes how many there are in its argument at this place."""

    def noting(*arguments):
        sizes.append(len(arguments[place]))
        return function(*arguments)

    return noting


def test_a_client_whose_training_fails_is_refused_and_those_trained_with_it_are_not(home, tmp_path, monkeypatch):
    fit = local.LocalTrainer.fit

    def fails(trainer, asked, rnd):
        if any(one.client.id == "001" for one in asked):
            raise RuntimeError("out of memory")
        return fit(trainer, asked, rnd)

    monkeypatch.setattr(local.LocalTrainer, "fit", fails)
    what = experiment(home, "fedit", "train.clients_per_step=4", rounds=1)
    serve(what, tmp_path / "run", Hand(make_nodes(what, tmp_path, (CLIENTS,))))
    row = rows_of(tmp_path / "run")[-1]
    assert row.accepted == ["000", "002", "003"] and row.rejected == {"001": "the client's work failed"}


@pytest.mark.parametrize("checked", [None, False])
def test_by_default_a_server_rejects_an_upload_far_larger_than_the_others_of_its_round(
    home, tmp_path, monkeypatch, checked
):
    fit = local.LocalTrainer.fit

    def thousandfold(trainer, asked, rnd):
        factor = [1000.0 if one.client.id == "001" else 1.0 for one in asked]
        return [
            replace(
                found, adapter={n: replace(p, **{f: x * by for f, x in vars(p).items()}) for n, p in found.adapter.items()}
            )
            for by, found in zip(factor, fit(trainer, asked, rnd), strict=True)
        ]

    monkeypatch.setattr(local.LocalTrainer, "fit", thousandfold)
    changes = [] if checked is None else ["sampling.check_cohort=false"]
    what = experiment(home, "fedit", "train.clients_per_step=4", *changes, rounds=1)
    serve(what, tmp_path / "run", Hand(make_nodes(what, tmp_path, (CLIENTS,))))
    row = rows_of(tmp_path / "run")[-1]
    assert row.accepted == (["000", "002", "003"] if checked is None else list(CLIENTS))
    assert ("times the round's median" in row.rejected.get("001", "")) == (checked is None)


def test_a_client_whose_training_gives_nan_is_refused_by_its_own_node(home, tmp_path, monkeypatch):
    fit = local.LocalTrainer.fit

    def nan_for_one(trainer, asked, rnd):
        factor = [torch.nan if one.client.id == "001" else 1.0 for one in asked]
        return [
            replace(
                found, adapter={n: replace(p, **{f: x * by for f, x in vars(p).items()}) for n, p in found.adapter.items()}
            )
            for by, found in zip(factor, fit(trainer, asked, rnd), strict=True)
        ]

    monkeypatch.setattr(local.LocalTrainer, "fit", nan_for_one)
    what = experiment(home, "fedit", "train.clients_per_step=4", rounds=1)
    serve(what, tmp_path / "run", Hand(make_nodes(what, tmp_path, (CLIENTS,))))
    row = rows_of(tmp_path / "run")[-1]
    assert row.accepted == ["000", "002", "003"]
    assert row.rejected == {"001": f"the client's work ended in {NOT_FINITE}"}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["flora", "fedsa-lora"])
def test_a_run_taken_up_again_after_its_server_died_before_a_commit_is_bit_for_bit_the_same(
    home, tmp_path, monkeypatch, method
):
    what = experiment(home, method)
    nodes = make_nodes(what, tmp_path)
    serve(what, tmp_path / "whole", Hand(make_nodes(what, tmp_path / "other")))
    commit = RunFolder.commit

    def dies(folder, done, *rest):
        if done == 2:
            raise RunStopped("killed")
        commit(folder, done, *rest)

    with monkeypatch.context() as patch, pytest.raises(RunStopped, match="killed"):
        patch.setattr(RunFolder, "commit", dies)
        serve(what, tmp_path / "again", Hand(nodes), server_session_id="1")  # the nodes have worked on round 3 already
    serve(what, tmp_path / "again", Hand(nodes), server_session_id="2")
    assert_same_runs(tmp_path / "whole", tmp_path / "again")


class Late(Hand):
    """A transport that brings no score before the next round's work has been sent."""

    def collect(self, message_ids: Collection[str]) -> Mapping[str, bytes | str]:
        requests = {str(i): decode_message(message)[0] for i, (_, message, _) in enumerate(self.carried)}
        worked = {
            request.round_record.index
            for request in requests.values()
            if isinstance(request, TaskRequest) and request.kind == "train"
        }
        early = {
            t
            for t in message_ids
            if isinstance(o := requests[t], TaskRequest) and o.kind == "evaluate" and o.round_record.index not in worked
        }
        last = max(worked, default=0) == 2
        return super().collect(message_ids if last else [t for t in message_ids if t not in early])


@pytest.mark.slow
def test_the_next_rounds_work_is_on_its_way_before_the_scores_are_in(home, tmp_path):
    what = experiment(home, "flora")
    run(what, tmp_path / "simulated")
    serve(what, tmp_path / "served", Late(make_nodes(what, tmp_path)))
    assert_same_runs(tmp_path / "simulated", tmp_path / "served")


@dataclass
class Leaky(Hand):
    """A transport that loses the messages of one kind to one node in one round."""

    lost: tuple[int, str, int] = (0, "", 0)

    def send(self, messages: Mapping[int, bytes], seconds: float) -> dict[str, int]:
        headers = {flower_id: decode_message(message)[0] for flower_id, message in messages.items()}
        gone = {
            flower_id
            for flower_id, o in headers.items()
            if isinstance(o, TaskRequest) and (flower_id, o.kind, o.round_record.index) == self.lost
        }
        message_ids = super().send(
            {flower_id: message for flower_id, message in messages.items() if flower_id not in gone}, seconds
        )
        return message_ids | {f"lost {flower_id}": flower_id for flower_id in gone}


@pytest.mark.slow
def test_a_node_that_never_got_a_base_update_that_was_sent_for_evaluation_trains_only_after_it_got_it(home, tmp_path):
    what = experiment(home, "flora", rounds=4, deploy={"deadline": 0.3, "poll": 0.01})
    hand = Leaky(make_nodes(what, tmp_path), lost=(1, "evaluate", 2))
    serve(what, tmp_path / "run", hand)
    _, *rows = rows_of(tmp_path / "run")
    assert [row.accepted for row in rows] == [list(CLIENTS), list(CLIENTS), list(CLIENTS[2:]), list(CLIENTS)]
    assert "lacks base updates (1)" in rows[2].rejected["000"]
    for node in ("node0", "node1"):
        assert sorted(f.stem for f in (tmp_path / node).glob("runs/*/base_updates/*")) == ["0", "1", "2", "3"]


@pytest.mark.slow
def test_a_node_whose_folder_was_lost_is_sent_every_base_update_again(home, tmp_path):
    what = experiment(home, "flora", rounds=4)
    nodes = make_nodes(what, tmp_path, (CLIENTS,))

    def loses(flower_id, message, result):
        header, _ = decode_message(message)
        if (
            isinstance(header, TaskRequest)
            and header.kind == "train"
            and (header.round_record.index, header.round_record.attempt) == (2, 0)
        ):
            shutil.rmtree(tmp_path / "node0" / "runs")
            nodes[1] = Node(tmp_path / "node0")
            hand.nodes_by_number = {2: nodes[1]}
            return None
        return result

    hand = Hand(nodes, loses)
    what = what.model_copy(update={"deploy": what.deploy.model_copy(update={"deadline": 0.3})})
    serve(what, tmp_path / "run", hand)
    _, *rows = rows_of(tmp_path / "run")
    assert rows[2].attempts == 2 and len(rows) == 4
    assert sorted(f.stem for f in (tmp_path / "node0").glob("runs/*/base_updates/*")) == ["0", "1", "2", "3"]


def first_upload(payloads, bend):
    tensors = decode(payloads[0])
    name = next(iter(tensors))
    return [encode({**tensors, name: bend(tensors[name])}), *payloads[1:]]


def nan(header, payloads):
    return encode_message(header, first_upload(payloads, lambda x: torch.full_like(x, float("nan"))))


def misshapen(header, payloads):
    return encode_message(header, first_upload(payloads, lambda x: x[:1]))


def of_another_round(header, payloads):
    return encode_message(
        header.model_copy(update={"round_record": header.round_record.model_copy(update={"index": 7})}), payloads
    )


def of_another_client(header, payloads):
    results = [result.model_copy(update={"id": "002"}) for result in header.results]
    return encode_message(header.model_copy(update={"results": results}), payloads)


def too_heavy(header, payloads):
    results = [result.model_copy(update={"weight": 1e9}) for result in header.results]
    return encode_message(header.model_copy(update={"results": results}), payloads)


def a_missing_payload(header, payloads):
    return encode_message(header, [])


BAD = {
    "NaN": (nan, "NaN or infinite"),
    "misshapen": (misshapen, "shape"),
    "garbage": (lambda header, payloads: b"\x80\x04garbage", "not a message"),
    "no tensors": (
        lambda header, payloads: encode_message(header, [b"garbage"] * len(payloads)),
        "not a payload of tensors",
    ),
    "cut": (lambda header, payloads: encode_message(header, payloads)[:-3], "damaged"),
    "replay": (of_another_round, "reply is for round 8"),
    "another's name": (of_another_client, "missing in its node's reply"),
    "too heavy": (too_heavy, "weight"),
    "a missing payload": (a_missing_payload, "payload is missing"),
    "rejected": (
        lambda header, payloads: encode_message(Rejected(failure=Failure(reason=Reason.DATA))),
        "data cannot be used",
    ),
    "a strange kind": (lambda header, payloads: encode_message(Batch()), "replied with 'batch'"),
    "Flower's error": (lambda header, payloads: "Flower says: gone", "gone"),
    "silence": (lambda header, payloads: None, "no reply within"),
}


@pytest.mark.parametrize("name", fast(BAD, "NaN", "cut", "silence"))
def test_a_bad_answer_is_refused_with_its_reason_and_the_round_goes_on_without_it(home, tmp_path, name):
    bad, reason = BAD[name]

    def spoil(flower_id, message, result):
        header, payloads = decode_message(result)
        return bad(header, payloads) if flower_id == 1 and isinstance(header, Done) and payloads else result

    what = experiment(home, rounds=1, evaluate={"clients": "none"}, deploy={"deadline": 0.3, "poll": 0.01})
    serve(what, tmp_path / "run", Hand(make_nodes(what, tmp_path, (CLIENTS[:1], CLIENTS[1:])), spoil))
    row = rows_of(tmp_path / "run")[-1]
    assert row.accepted == ["001", "002", "003"]
    assert list(row.rejected) == ["000"] and reason in row.rejected["000"]


def changed_statistics(change):
    """Changes the statistics with `change` before they are sent."""
    return lambda result, payload: (result, encode(change(decode(payload))))


def moved(counts):
    """As many counts, one of them negative."""
    return counts + torch.tensor([[-100, 100, 0]] + [[0, 0, 0]] * 2)


BAD_SCORES = {
    "no statistics of the task": (changed_statistics(lambda sums: {"x": sums["loss"]}), "are not confusion, loss"),
    "one sum too few": (changed_statistics(lambda sums: {"loss": sums["loss"]}), "statistics are not confusion, loss"),
    "labels too many": (changed_statistics(lambda sums: {**sums, "confusion": torch.ones(4, 4).long()}), "is [4, 4] of"),
    "counts that are no integers": (
        changed_statistics(lambda sums: {**sums, "confusion": sums["confusion"].double()}),
        "of torch.float64, expected [3, 3] of torch.int64",
    ),
    "a negative count": (
        changed_statistics(lambda sums: {**sums, "confusion": moved(sums["confusion"])}),
        "negative count",
    ),
    "counts of other examples": (
        changed_statistics(lambda sums: {**sums, "confusion": sums["confusion"] + 1}),
        "confusion counts are of",
    ),
    "counts that overflow": (
        changed_statistics(lambda sums: {**sums, "confusion": torch.full((3, 3), 2**62)}),
        "confusion is not finite, or beyond 1e+15",
    ),
    "a sum that overflows": (changed_statistics(lambda sums: {**sums, "loss": sums["loss"] * 0 + 1e308}), "beyond 1e+15"),
    "a loss that is no number": (changed_statistics(lambda sums: {**sums, "loss": sums["loss"] * torch.nan}), "not finite"),
    "a negative loss": (changed_statistics(lambda sums: {**sums, "loss": -sums["loss"]}), "its loss is negative"),
    "too many bytes": (changed_statistics(lambda sums: {**sums, "x": torch.zeros(9999)}), "bytes, expected at most"),
    "no tensors": (lambda result, payload: (result, b"nothing"), "not a payload"),
    "more examples than declared": (
        lambda result, payload: (result.model_copy(update={"examples": 10**6}), payload),
        "covers 1000000 examples",
    ),
    "statistics of no examples": (
        lambda result, payload: (result.model_copy(update={"examples": 0}), payload),
        "covers 0 examples, and has some statistics",
    ),
    "examples without statistics": (
        lambda result, payload: (result.model_copy(update={"payload": None}), payload),
        "examples, and has no statistics",
    ),
}


@pytest.mark.parametrize("name", fast(BAD_SCORES, "a sum that overflows", "counts of other examples"))
def test_a_bad_score_is_rejected_with_its_reason_and_the_round_goes_on_without_it(home, tmp_path, name):
    change, reason = BAD_SCORES[name]

    def spoil(flower_id, message, result):
        header, payloads = decode_message(result)
        if flower_id != 1 or not isinstance(header, Done) or not header.results[0].examples:
            return result
        (one,), (payload,) = header.results, payloads
        one, payload = change(one, payload)
        return encode_message(header.model_copy(update={"results": [one]}), [payload])

    what, said = experiment(home, rounds=1), []
    serve(what, tmp_path / "run", Hand(make_nodes(what, tmp_path, (CLIENTS[:1], CLIENTS[1:])), spoil), said=said)
    assert set(rows_of(tmp_path / "run")[-1].clients["loss"].each) == {"001", "002", "003"}
    assert len(said) == 2 and all("client 000: its score is rejected" in line and reason in line for line in said)


def test_a_score_over_ten_to_the_320_examples_is_no_message(home, tmp_path):
    def spoil(flower_id, message, result):
        header, _ = decode_message(result)
        if flower_id != 1 or not isinstance(header, Done) or not header.results[0].examples:
            return result
        frame = wire._Frame(header=header, sizes=[]).model_dump_json().encode()
        number = f'"examples":{header.results[0].examples}'.encode()
        rest = frame.replace(number, b'"examples":1' + b"0" * 320)
        rest = len(rest).to_bytes(8, "big") + rest
        return wire._MAGIC + wire._digest(rest) + rest

    what, said = experiment(home, rounds=1), []
    serve(what, tmp_path / "run", Hand(make_nodes(what, tmp_path, (CLIENTS[:1], CLIENTS[1:])), spoil), said=said)
    assert set(rows_of(tmp_path / "run")[-1].clients["loss"].each) == {"001", "002", "003"}
    assert len(said) == 2 and all("client 000" in line for line in said)


@pytest.mark.slow
def test_a_key_speaks_only_for_the_clients_that_it_was_made_for(home, tmp_path):
    what, said = experiment(home), []
    hand = Hand(make_nodes(what, tmp_path, (CLIENTS[:2], CLIENTS[2:])))
    hand.credentials = {1: Credential("a", frozenset(CLIENTS[:2])), 2: Credential("b", frozenset({"002"}))}
    with pytest.raises(RunStopped, match=r"expected 4 clients .* connected: 000, 001; "):
        serve(what, tmp_path / "run", hand, said=said)
    assert len(said) == 1 and said[0].startswith("node 2 rejected")
    hand.credentials[2] = Credential("b", frozenset(CLIENTS[1:]))
    serve(what, tmp_path / "again", hand, server_session_id="2")


def test_a_thousand_clients_of_one_key_are_not_accepted(home, tmp_path):
    def spoil(flower_id, message, result):
        header, _ = decode_message(result)
        many = [ClientRecord(id=f"{i}", rank=2, examples=9) for i in range(1000)]
        return encode_message(header.model_copy(update={"clients": many})) if isinstance(header, HandshakeReply) else result

    what, said = experiment(home), []
    hand = Hand(make_nodes(what, tmp_path, (CLIENTS,)), spoil, credentials={1: Credential("a", frozenset(CLIENTS))})
    with pytest.raises(RunStopped, match="connected: none"):
        serve(what, tmp_path / "run", hand, said=said)
    assert "1000 entries, expected at most 4" in said[0]


def test_a_node_with_another_key_does_not_take_the_place_of_a_node_whose_name_it_gives(home, tmp_path):
    def spoil(flower_id, message, result):
        header, _ = decode_message(result)
        same = {"node": "same", "clients": [ClientRecord(id=CLIENTS[2 * flower_id - 2], rank=2, examples=9)]}
        return encode_message(header.model_copy(update=same)) if isinstance(header, HandshakeReply) else result

    what = experiment(home)
    hand = Hand(make_nodes(what, tmp_path), spoil)
    hand.credentials = {1: Credential("a", frozenset({"000"})), 2: Credential("b", frozenset({"002"}))}
    session = Session.make(what, FederatedData.of_server(what))
    remote = make_remote(what, session, hand)
    remote.wait_for_clients(2, 0.0)
    assert [client.id for client in remote.clients()] == ["000", "002"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": "0"}, "has fedlora 0"),
        ({"base": "f" * 64}, "another base model"),
        ({"clients": [ClientRecord(id="000", rank=5, examples=3)]}, "has rank 5"),
        ({"clients": [ClientRecord(id="002", rank=2, examples=3)]}, "already registered"),
        ({"clients": [ClientRecord(id="000", rank=2, examples=3)] * 2}, "two clients with the same name"),
    ],
)
def test_a_node_that_does_not_fit_is_refused_with_its_reason(home, tmp_path, change, reason):
    def spoil(flower_id, message, result):
        header, _ = decode_message(result)
        return (
            encode_message(header.model_copy(update=change))
            if flower_id == 2 and isinstance(header, HandshakeReply)
            else result
        )

    said = []
    with pytest.raises(RunStopped, match=reason):
        what = experiment(home)
        serve(what, tmp_path / "run", Hand(make_nodes(what, tmp_path, (CLIENTS[2:], CLIENTS[:2])), spoil), said=said)
    assert len(said) == 1 and reason in said[0]


def test_a_client_whose_disk_is_full_is_refused_with_its_reason(home, tmp_path, monkeypatch):
    save = RunFolder.save_client

    def full(folder, client, *rest):
        if client.id == "001":
            raise RunStopped("cannot write: No space left on device")
        save(folder, client, *rest)

    monkeypatch.setattr(RunFolder, "save_client", full)
    what = experiment(home, "fedsa-lora", rounds=1)
    serve(what, tmp_path / "run", Hand(make_nodes(what, tmp_path)))
    row = rows_of(tmp_path / "run")[-1]
    assert row.accepted == ["000", "002", "003"] and "could not write its files" in row.rejected["001"]


def test_the_ledger_is_what_the_messages_carry(home, tmp_path):
    what = experiment(home, "flora", rounds=2)
    hand = Hand(make_nodes(what, tmp_path, [[client] for client in CLIENTS]))
    serve(what, tmp_path / "run", hand)
    carried = {"bytes_down": [0, 0, 0], "bytes_up": [0, 0, 0], "bytes_eval": [0, 0, 0]}
    for _, message, result in hand.carried:
        header, payloads = decode_message(message)
        if isinstance(header, TaskRequest) and header.kind == "train":
            carried["bytes_down"][header.round_record.index + 1] += sum(map(len, payloads))
            carried["bytes_up"][header.round_record.index + 1] += sum(map(len, decode_message(result)[1]))
        elif isinstance(header, TaskRequest):
            (task,) = header.tasks
            carried["bytes_eval"][header.round_record.index] += len(payloads[task.download])
            if task.base_updates is not None:
                carried["bytes_down"][header.round_record.index] += len(payloads[task.base_updates])
    assert carried == {key: [getattr(row, key) for row in rows_of(tmp_path / "run")] for key in carried}


def test_a_node_with_a_file_of_its_own_is_one_client_with_all_its_examples(home, tmp_path):
    what = experiment(home, rounds=1, clients={"count": 2}, data={"source": "none", "labels": list(LABELS)})
    nodes = {}
    for i, size in enumerate((21, 30)):
        file = tiny_rows(tmp_path / f"{size}.jsonl", size)
        settings = Settings(clients=[f"clinic {size}"], data=str(file), overrides=[f"model={home / 'bert'}"], accept=True)
        settings.write(tmp_path / f"node{i}")
        nodes[i] = Node(tmp_path / f"node{i}")
    serve(what, tmp_path / "run", Hand(nodes), count=2)
    row = rows_of(tmp_path / "run")[-1]
    assert row.accepted == ["clinic 21", "clinic 30"] and row.global_ is None
    assert set(row.clients["accuracy"].each) == {"clinic 21", "clinic 30"}


def test_a_run_with_privacy_for_records_leaves_the_promised_steps_on_each_nodes_ledger(home, tmp_path):
    what = experiment(
        home,
        rounds=2,
        clients={"count": 2},
        data={"source": "none", "labels": list(LABELS)},
        train={"batch_size": 5, "max_steps": 3, "max_length": 16, "device": "cpu"},
        privacy={"unit": "record", "noise_multiplier": 1.0, "delta": 1e-5},
        evaluate={"clients": "none"},
    )
    nodes = {}
    for i, size in enumerate((21, 30)):
        file = str(tiny_rows(tmp_path / f"{size}.jsonl", size))
        policy = Policy(privacy=PrivacyLimits(unit="record", run_epsilon=1e3, delta=1e-5, clip=0.5))
        settings = {"data": file, "overrides": [f"model={home / 'bert'}"], "policy": policy}
        Settings(clients=[f"clinic {size}"], **settings).write(tmp_path / f"node{i}")
        nodes[i] = Node(tmp_path / f"node{i}")
    serve(what, tmp_path / "run", Hand(nodes), count=2)
    assert [row.accepted for row in rows_of(tmp_path / "run")[1:]] == [["clinic 21", "clinic 30"]] * 2
    paths = list(default_folder().glob("*.json"))
    assert len(paths) == 2
    for path in paths:
        found = PrivacyLedger(path.parent, path.stem, lambda *_: 0.0).releases()
        assert [(one.count, one.settled, one.noise_multiplier) for one in found] == [(3, True, 1.0)] * 2


@pytest.mark.parametrize("method", fast(["fedsa-lora", "pfedloru"], "fedsa-lora"))
def test_after_a_run_with_a_personal_method_every_node_has_its_clients_adapters(home, tmp_path, method):
    what = experiment(home, method, rounds=2)
    simulated = run(what, tmp_path / "simulated").adapters
    deploy.prepare(what, tmp_path / "served")
    server.serve(tmp_path / "served", Hand(make_nodes(what, tmp_path)))
    for client, folder in simulated.items():
        (found,) = tmp_path.glob(f"node*/runs/*/adapter/{client}/adapter_model.safetensors")
        assert found.read_bytes() == (folder / found.name).read_bytes()
    with pytest.raises(UserError, match="in its node's folder"):
        export(tmp_path / "served", "adapter", tmp_path / "out")
