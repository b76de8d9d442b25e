"""The laws that every row of the table obeys. No law asks for a method's name."""

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from fedlora.adapter import Adapter, AdapterSpec, Tensors
from fedlora.messages import ClientInfo, Merged, Replies, Reply, Round
from fedlora.methods import TABLE, Row
from fedlora.rounds.codec import decode, decode_state, encode, encode_state
from fedlora.rounds.loop import Progress, one_round
from fedlora.rounds.simulate import Simulation

from toy import MemoryStates, Quiet, Recorder, ToyTrainer, products, toy_clients, toy_method, toy_plan

every_row = pytest.mark.parametrize("row", TABLE.values(), ids=TABLE.keys())
ROUNDS = 4


@every_row
def test_the_wire_changes_nothing(row):
    assert_same(play(row, exchange=ThroughBytes).weights, play(row).weights)


@every_row
def test_the_order_of_clients_does_not_matter(row):
    assert_same(play(row, toy_clients()[::-1]).weights, play(row, toy_clients()).weights)


@every_row
def test_one_client_alone_trains_locally(row):
    game = play(row, toy_clients(1))
    assert_close(game.weights["0"], game.trainer.weights["0"])


@every_row
def test_identical_clients_are_as_one(row):
    alike = [ClientInfo(name, 3, 10) for name in ("x", "y", "z")]
    game = play(row, alike, trainer=Recorder(ToyTrainer(skew=0.0)))
    alone = play(row, alike[:1], trainer=Recorder(ToyTrainer(skew=0.0)))
    for who in alike:
        assert_close(game.weights[who.id], alone.weights["x"])


@every_row
def test_a_client_of_weight_zero_changes_nothing(row):
    method, server, replies = a_round_of_replies(row)
    without = method.merge(server, Replies(replies[:-1]), replies[0].round)
    with_zero = method.merge(server, Replies([*replies[:-1], replace(replies[-1], weight=0.0)]), replies[0].round)
    for who in toy_clients():
        assert_close(*(change(method, merged, who) for merged in (with_zero, without)))


@every_row
def test_only_the_ratio_of_weights_matters(row):
    method, server, replies = a_round_of_replies(row)
    scaled = [replace(reply, weight=reply.weight * 1000) for reply in replies]
    both = [method.merge(server, Replies(some), replies[0].round) for some in (replies, scaled)]
    for who in toy_clients():
        assert_close(*(change(method, merged, who) for merged in both))


@every_row
def test_a_client_that_comes_late_can_join_and_helps(row):
    game = play(row, toy_clients(6), fraction=0.5, rounds=8)
    late = {who for r in game.rows[1:] for who in r["chosen"]} - set(game.rows[0]["chosen"])
    assert late and all(len(r["accepted"]) == 3 for r in game.rows)
    scores = [r["clients"]["accuracy"]["mean"] for r in game.rows]
    assert scores[-1] > scores[0]


@every_row
def test_states_survive_saving_and_loading(row, tmp_path):
    game = play(row)
    for i, state in enumerate([game.progress, *game.states.saved.values(), *game.states.folds.values()]):
        file = tmp_path / str(i)
        file.write_bytes(encode_state(state))
        assert encode_state(decode_state(str(file))[0]) == encode_state(state)


@every_row
def test_a_resumed_run_is_bit_for_bit_the_same(row, tmp_path):
    whole, first = play(row), play(row, rounds=2)
    file = tmp_path / "server"
    file.write_bytes(encode_state(first.progress))
    second = play(row, progress=decode_state(str(file))[0], states=first.states, start=2)
    assert_same(second.weights, whole.weights)


@every_row
def test_traffic_is_what_the_row_declares(row):
    """Floats of the factors, rank 3; the head is the row's rule and comes on top."""
    game = play(row)
    for r in range(ROUNDS):
        for declared, counted in ((row.up, game.exchange.floats_up), (row.down, game.exchange.floats_down)):
            formula = declared[r % len(declared)]
            expected = sum(evaluate(formula, r=3, out=out, in_=in_) for out, in_ in game.trainer.spec.modules.values())
            head = sum(x.numel() for x in game.trainer.spec.head.values()) if row.head == "averaged" else 0
            assert counted[r] == {expected + head}


@every_row
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_is_kept(row, dtype):
    spec = AdapterSpec(SPEC.modules, {name: x.to(dtype) for name, x in SPEC.head.items()}, dtype)
    game = play(row, trainer=Recorder(ToyTrainer(spec=spec)))
    assert {x.dtype for weights in game.weights.values() for x in weights.values()} == {dtype}
    assert all(x.dtype == dtype for upload in game.exchange.uploads for x in upload.values() if x.is_floating_point())


@every_row
def test_a_bad_upload_is_refused_and_the_round_goes_on(row):
    game = play(row, exchange=Poisoned)
    assert all(r["accepted"] == ["0", "1", "3"] and "NaN" in r["refused"]["2"] for r in game.rows)
    assert all(bool(x.isfinite().all()) for weights in game.weights.values() for x in weights.values())


@every_row
def test_the_server_cannot_tell_what_merging_did_to_its_arguments(row):
    method, server, replies = a_round_of_replies(row)
    before = encode_state(server), [encode(reply.upload) for reply in replies]
    method.merge(server, Replies(replies), replies[0].round)
    assert (encode_state(server), [encode(reply.upload) for reply in replies]) == before


@every_row
def test_it_learns(row):
    row = replace(row, head="averaged" if row.head == "frozen" else row.head)
    game, untrained = play(row, rounds=12), play(row, rounds=0)
    for who, view in game.views.items():
        assert game.trainer.inner.loss(view, who) < 0.8 * untrained.trainer.inner.loss(untrained.views[who], who)


@every_row
def test_a_frozen_head_never_travels_and_never_changes(row):
    game = play(replace(row, head="frozen"))
    for view in game.views.values():
        assert all(torch.equal(products(view)[name], x) for name, x in SPEC.head.items())
    assert not any(name.startswith("head/") for upload in game.exchange.uploads for name in upload)


@every_row
def test_an_averaged_head_is_the_weighted_mean_of_the_trained_heads(row):
    clients = toy_clients()
    game = play(replace(row, head="averaged"), clients, rounds=1)
    total = sum(who.examples for who in clients)
    heads = [(who.examples / total, products(game.trainer.last[who.id])) for who in clients]
    mean = {name: sum(weight * head[name] for weight, head in heads) for name in SPEC.head}
    assert_close({name: products(game.views["0"])[name] for name in SPEC.head}, mean)


@every_row
def test_a_local_head_stays_on_its_client(row):
    game = play(replace(row, head="local"))
    for who, view in game.views.items():
        assert all(torch.equal(products(view)[name], products(game.trainer.last[who])[name]) for name in SPEC.head)


# ------------------------------------------------------------------------------------------------------------- the players

SPEC = ToyTrainer().spec
Sent = Mapping[ClientInfo, Tensors]


@dataclass
class Counting:
    """An exchange that counts what travels."""

    inner: Simulation
    floats_up: dict[int, set[int]] = field(default_factory=dict)
    floats_down: dict[int, set[int]] = field(default_factory=dict)
    uploads: list[Tensors] = field(default_factory=list)

    def clients(self) -> Sequence[ClientInfo]:
        return self.inner.clients()

    def fold(self, change: Any) -> None:
        self.inner.fold(change)

    def turn(self, rnd: Round, sent: Sent, missed: Sent) -> Iterator[Reply]:
        traffic = [[*got.values(), *missed.get(who, {}).values()] for who, got in sent.items()]
        self.floats_down[rnd.index] = {sum(x.numel() for x in tensors) for tensors in traffic}
        for reply in self.inner.turn(rnd, sent, missed):
            self.floats_up.setdefault(rnd.index, set()).add(sum(x.numel() for x in reply.upload.values()))
            self.uploads.append(reply.upload)
            yield reply

    def judge(self, rnd: Round, sent: Sent, missed: Sent) -> Iterator[Any]:
        return self.inner.judge(rnd, sent, missed)


class ThroughBytes(Counting):
    """Everything is encoded and decoded on its way."""

    def turn(self, rnd: Round, sent: Sent, missed: Sent) -> Iterator[Reply]:
        for reply in super().turn(rnd, {who: decode(encode(got)) for who, got in sent.items()}, missed):
            yield replace(reply, upload=decode(encode(reply.upload)))

    def judge(self, rnd: Round, sent: Sent, missed: Sent) -> Iterator[Any]:
        return super().judge(rnd, {who: decode(encode(got)) for who, got in sent.items()}, missed)


class Poisoned(Counting):
    """Client 2 sends NaN in its first tensor."""

    def turn(self, rnd: Round, sent: Sent, missed: Sent) -> Iterator[Reply]:
        for reply in super().turn(rnd, sent, missed):
            name = next(iter(reply.upload))
            bad = {**reply.upload, name: torch.full_like(reply.upload[name], float("nan"))}
            yield replace(reply, upload=bad) if reply.client.id == "2" else reply


@dataclass(frozen=True)
class Game:
    """What is left after some rounds."""

    progress: Progress
    rows: Sequence[Mapping[str, Any]]
    views: Mapping[str, Adapter]
    weights: Mapping[str, Mapping[str, torch.Tensor]]
    states: MemoryStates
    exchange: Any
    trainer: Recorder


def play(
    row: Row,
    clients: Sequence[ClientInfo] | None = None,
    *,
    rounds: int = ROUNDS,
    start: int = 0,
    progress: Progress | None = None,
    states: MemoryStates | None = None,
    trainer: Recorder | None = None,
    exchange: type[Counting] = Counting,
    fraction: float = 1.0,
) -> Game:
    """Some rounds of the row's method on the toy; every client's view after them."""
    clients = clients or toy_clients()
    trainer, states = trainer or Recorder(), states or MemoryStates()
    method = toy_method(row)
    simulation = Simulation(method, trainer.spec, clients, states, trainer, seed=0)
    through, plan = exchange(simulation), toy_plan(method, trainer, fraction=fraction, rounds=rounds)
    progress = progress or Progress(method.init_server(trainer.spec, 0))
    for index in progress.folds.rounds:
        simulation.fold(states.fold(index))
    rows = []
    for index in range(start, rounds):
        progress, logged = one_round(plan, through, states, progress, index, Quiet())
        rows.append(logged)
    rnd = Round(rounds, 0)
    views = {who.id: simulation.view(who, method.send(progress.server, who, rnd), rnd) for who in clients}
    weights = {who: trainer.inner.weights(view) for who, view in views.items()}
    return Game(progress, rows, views, weights, states, through, trainer)


def a_round_of_replies(row: Row) -> tuple[Any, Any, list[Reply]]:
    """A method, its server's state after two rounds, and the next round's replies."""
    game = play(row, rounds=2)
    method, rnd = toy_method(row), Round(2, 0)
    server = game.progress.server
    sent = {who: method.send(server, who, rnd) for who in toy_clients()}
    return method, server, list(game.exchange.turn(rnd, sent, {}))


def change(method: Any, merged: Merged[Any], who: ClientInfo) -> dict[str, torch.Tensor]:
    """What a client that has never taken part would add to the base as it was before the merge."""
    view = method.view(method.init_client(SPEC, who, 0), method.send(merged.server, who, Round(3, 0)), who)
    folded = {name: part.product() for name, part in (merged.fold or {}).items()}
    return {name: x + folded.get(name, 0) for name, x in products(view).items()}


def evaluate(formula: str, r: int, out: int, in_: int) -> int:
    """The number of floats a formula in r, out and in gives."""
    tree = ast.parse(formula.replace("in", "in_"), mode="eval")
    return int(eval(compile(tree, "<row>", "eval"), {"__builtins__": {}, "min": min}, {"r": r, "out": out, "in_": in_}))


def assert_same(left: Mapping[str, Mapping[str, Any]], right: Mapping[str, Mapping[str, Any]]) -> None:
    """Every client's weights, bit for bit."""
    assert left.keys() == right.keys()
    for who in left:
        one, other = left[who], right[who]
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def assert_close(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> None:
    """Up to the rounding of fp32."""
    torch.testing.assert_close(dict(left), dict(right), rtol=1e-4, atol=1e-5)
