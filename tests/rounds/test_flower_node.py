"""The node and the exchange in one process: all but Flower itself."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import pytest

from fedlora.config import build
from fedlora.experiment import Bench, Problem, Silent, rounds, run
from fedlora.rounds.checkpoint import RunFolder
from fedlora.rounds.flower.door import Door
from fedlora.rounds.flower.exchange import Remote
from fedlora.rounds.flower.node import Node, Settings, fingerprint
from fedlora.rounds.flower.wire import Hello
from fedlora.version import __version__

from tiny import tiny_bert, tiny_rows
from wired import CLIENTS, assert_same_runs, problem


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    tiny_bert(folder / "bert")
    tiny_rows(folder / "rows.jsonl", 80)
    return folder


def experiment(home, method="fedit", **more):
    return build(problem(home, method, **more))


@dataclass
class Hand:
    """A post that carries messages by hand; `spoil` may change an answer, and nodes may be unplugged."""

    nodes_by_number: dict[int, Node]
    spoil: object = None
    away: set[int] = field(default_factory=set)
    answers: dict[str, bytes | str] = field(default_factory=dict)
    carried: list[tuple[int, bytes, bytes]] = field(default_factory=list)

    def nodes(self) -> Collection[int]:
        return self.nodes_by_number.keys() - self.away

    def send(self, letters: Mapping[int, bytes], seconds: float) -> dict[str, int]:
        tickets = {}
        for at, letter in letters.items():
            ticket = f"{len(self.carried)}"
            answer = self.nodes_by_number[at].answer(letter)
            self.carried.append((at, letter, answer))
            if self.spoil is not None:
                answer = self.spoil(at, letter, answer)
            if answer is not None:
                self.answers[ticket] = answer
            tickets[ticket] = at
        return tickets

    def collect(self, tickets: Collection[str]) -> Mapping[str, bytes | str]:
        return {ticket: self.answers.pop(ticket) for ticket in list(tickets) if ticket in self.answers}


def make_nodes(folder, groups=(CLIENTS[:2], CLIENTS[2:])):
    nodes = {}
    for i, clients in enumerate(groups):
        Settings(clients=list(clients)).write(folder / f"node{i}")
        nodes[i + 1] = Node(folder / f"node{i}")
    return nodes


def serve(what, folder, hand, life="1", count=4, said=None):
    """The run over the post, taken up where its folder says."""
    folder.mkdir(exist_ok=True)
    lock = RunFolder(folder)
    try:
        bench = Bench.make(what, Problem.of_server(what))
        remote = make_remote(what, bench, hand, life, lock.restore()[0], said)
        remote.gather(count, 0.5)
        return rounds(bench, lock, Silent(), remote)
    finally:
        lock.release()


def make_remote(what, bench, hand, life="1", done=0, said=None):
    hello = Hello(
        protocol=1,
        version=__version__,
        run="r",
        experiment=what.to_toml(),
        labels=list(bench.problem.corpus.labels),
        life=life,
        done=done,
    )
    row = what.method.row
    door = Door(fingerprint(bench.adapted.model), what.method.rank, row.mixed_ranks)
    tell = [] if said is None else said
    return Remote(hand, hello, door, bench.trainer, what.deploy.deadline, what.deploy.poll, tell.append)


@pytest.mark.parametrize("method", ["fedit", "flora", "fedsa-lora"])
def test_over_the_wire_a_run_is_bit_for_bit_the_simulated_one(home, tmp_path, method):
    what = experiment(home, method)
    run(what, tmp_path / "simulated")
    serve(what, tmp_path / "served", Hand(make_nodes(tmp_path)))
    assert_same_runs(tmp_path / "simulated", tmp_path / "served")
