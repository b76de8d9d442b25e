"""LoRA-A2 with a choice of ranks that the server makes for all clients."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fedlora.adapter import AdapterSpec, pack, pick
from fedlora.messages import ClientInfo, Fit, Mean, Reply, Round, Upload
from fedlora.method import ClientRound
from fedlora.methods.lora_a2 import LoRAA2
from fedlora.methods.rank_scores import RankScores
from fedlora.methods.wrap.head import with_head
from fedlora.rounds.codec import decode_state, encode_state
from fedlora.rounds.frame import frame_of
from fedlora.rounds.loop import run_rounds
from fedlora.rounds.plan import RunState
from fedlora.rounds.validator import template_upload

from merging import known_of, merge
from toy import SPEC, MemoryStates, Quiet, Recorder, ToyTrainer, products, toy_clients, toy_plan, toy_simulation
from uploads import factors, rejection

RANK, MODULES = 4, list(SPEC.modules)
M = LoRAA2(rank=RANK, b_rate=2.0, shared_rank=1)
ROUNDS = {"b": Round(0, 0), "a": Round(1, 0)}
PINNED = AdapterSpec(SPEC.modules, SPEC.head, rank_pattern={MODULES[0]: 3})


def server_with(scores: Sequence[float], side: str = "b", spec: AdapterSpec = SPEC) -> RankScores:
    """Random factors, and these scores of all ranks."""
    start = RankScores.init(spec, RANK, 0)
    return replace(
        start,
        adapter=factors(RANK, "start", spec=spec, size=0.4),
        scores={**start.scores, side: torch.tensor([float(score) for score in scores])},
    )


def replies_of(server: RankScores, clients: Sequence[ClientInfo], rnd: Round, method: Any = M) -> list[Reply]:
    """The replies of a round of the toy."""
    backend = toy_simulation(method, ToyTrainer(), clients)
    return list(backend.train_clients(rnd, {client: method.send(server, client, rnd) for client in clients}, {}))  # type: ignore[arg-type]


def masks(method: Any, server: RankScores, client: ClientInfo, rnd: Round, spec: AdapterSpec = SPEC) -> list[list[bool]]:
    """Which ranks of each module the client trains in its only training."""
    asked: list[Any] = []
    template_upload(method, known_of(method, server, reply_from(client, rnd), spec), asked)
    (only,) = asked
    assert isinstance(only, Fit) and only.role == "upload" and only.mask is not None
    return [x.flatten().tolist() for x in only.mask.values()]


def reply_from(client: ClientInfo, rnd: Round) -> Reply:
    return Reply(client, rnd, Upload({}), 1.0)


def played(
    method: Any, rounds: int, clients: Sequence[ClientInfo], start: RunState | None = None, first: int = 0
) -> RunState:
    """The state after some rounds of the toy, half of the clients in each."""
    trainer = ToyTrainer()
    plan, backend = toy_plan(method, trainer, rounds=rounds, fraction=0.5), toy_simulation(method, trainer, clients)
    start = start or RunState(method.init_server(trainer.spec, 0))
    *_, (after, _) = run_rounds(plan, backend, MemoryStates(), start, first, Quiet())
    return after


@pytest.mark.parametrize("seed", range(5))
def test_unchanged_ranks_come_first_then_the_highest_scores_and_equal_ones_in_order(seed):
    drawn = torch.randint(0, 4, (RANK + 3,), generator=torch.Generator().manual_seed(seed)).tolist()
    server, places = server_with(drawn, spec=PINNED), [(0, i) for i in range(3)] + [(1, i) for i in range(RANK)]

    def key(position: int) -> tuple[bool, float, int, int]:
        module, rank = places[position]
        return drawn[position] > 0, -drawn[position], rank, module

    assert server.first("b", RANK).tolist() == sorted(range(RANK + 3), key=key)


def test_each_factor_has_scores_of_its_own():
    server = server_with([1, 2, 3, 4, 5, 6, 7, 8], "a")
    assert server.first("a", 1).tolist() == [7, 6]
    assert server.first("b", 1).tolist() == [0, RANK]


def test_a_fixed_rank_counts_as_it_is():
    server = server_with([1, 2, 3, 4, 5, 6, 7], spec=PINNED)
    assert len(server.first("b", 1)) == 3 + 1
    assert sum(map(sum, masks(M, server, ClientInfo("0", RANK, 1), ROUNDS["b"], PINNED))) == 4


@pytest.mark.parametrize("side", ROUNDS)
def test_clients_train_the_chosen_ranks_without_a_probe_and_those_of_smaller_ranks_the_most_important(side):
    server, m = server_with([5, 1, 1, 9, 3, 1, 8, 1], side), replace(M, shared_rank=2)
    both = [[True, False, False, True], [True, False, True, False]]
    most = [[False, False, False, True], [False, False, True, False]]
    for rank, wanted in ((4, both), (2, both), (1, most)):
        assert masks(m, server, ClientInfo("0", rank, 1), ROUNDS[side]) == wanted


@pytest.mark.parametrize("side", ROUNDS)
def test_the_frame_and_the_size_of_uploads_depend_on_the_choice_and_not_on_the_client(side):
    server, m = server_with([5, 1, 1, 9, 3, 1, 8, 1], side), replace(M, shared_rank=2)
    widths = [size[0 if side == "b" else 1] for size in SPEC.modules.values()]
    replies = replies_of(server, toy_clients(3, [1, 2, 4]), ROUNDS[side], m)
    for reply in replies:
        frame = frame_of(m, known_of(m, server, reply, SPEC))
        assert not reply.upload.choices and not frame.constant
        assert {name: x.shape for name, x in frame.template.items()} == {"changes": (2 * sum(widths),)}
        assert not frame.template["changes"].any()
    own = replies[0].upload.values["changes"].split([2 * widths[0], 2 * widths[1]])
    per_rank = [bool(x.any()) for part, width in zip(own, widths, strict=True) for x in part.split(width)]
    assert per_rank == [False, True, False, True], "zeros for the ranks that a client of rank 1 does not train"


@pytest.mark.parametrize("side", ROUNDS)
def test_the_merge_is_the_mean_of_the_products_and_leaves_all_else_bit_for_bit(side):
    server, clients = server_with([5, 1, 1, 9, 3, 1, 8, 1], side), toy_clients(3, RANK)
    trainer = Recorder()
    backend, rnd = toy_simulation(M, trainer, clients), ROUNDS[side]
    replies = list(backend.train_clients(rnd, {client: M.send(server, client, rnd) for client in clients}, {}))
    merged = merge(M, server, replies, SPEC)
    total = sum(client.examples for client in clients)
    for name, part in merged.server.adapter.items():
        mean = sum(client.examples / total * products(trainer.last[client.id])[name].double() for client in clients)
        assert_close(part.product().double(), mean, rtol=1e-5, atol=1e-6)
    assert merged.notes["aggregation_error"] < 1e-6
    before, after = pack(server.adapter), pack(merged.server.adapter)
    for key, kept in {MODULES[0]: [0, 1, 2], MODULES[1]: [0, 1, 3]}.items():
        one, other = (x[f"{key}.{side}"].mT if side == "b" else x[f"{key}.{side}"] for x in (before, after))
        assert torch.equal(one[kept], other[kept]) and not torch.equal(one, other)
    frozen = "a" if side == "b" else "b"
    assert all(torch.equal(x, before[key]) for key, x in pick(after, frozen).items())


@pytest.mark.parametrize("side", ROUNDS)
def test_new_scores_are_those_of_the_merged_change_for_the_chosen_ranks_only(side):
    server = server_with([5, 1, 1, 9, 3, 1, 8, 1], side)
    after = merge(M, server, replies_of(server, toy_clients(3, RANK), ROUNDS[side]), SPEC).server
    for position, (module, rank) in {3: (0, 3), 6: (1, 2)}.items():
        part, moved = (state.adapter[MODULES[module]] for state in (server, after))
        change = torch.outer(moved.b[:, rank], moved.a[rank]) - torch.outer(part.b[:, rank], part.a[rank])
        entries = len(part.b if side == "b" else part.a[rank])
        assert_close(after.scores[side][position], change.norm() / entries**0.5, rtol=1e-4, atol=1e-6)
    kept = [0, 1, 2, 4, 5, 7]
    assert torch.equal(after.scores[side][kept], server.scores[side][kept])
    other = "a" if side == "b" else "b"
    assert torch.equal(after.scores[other], server.scores[other])


def test_strong_noise_does_not_prefer_wide_modules():
    """In the method's own score, noise of equal size in all entries gives wide modules a higher score."""
    spec = AdapterSpec({"wide": (900, 30), "narrow": (9, 30)})
    m = LoRAA2(rank=8, shared_rank=8)
    server, rng = m.init_server(spec, 0), torch.Generator().manual_seed(0)
    changes = torch.randn(8 * 909, generator=rng)
    after = m.merge(server, Mean.of([(1.0, {"changes": changes})]), ROUNDS["b"]).server
    assert isinstance(after, RankScores)
    wide, narrow = after.scores["b"].split(8)
    assert 0.5 < float(wide.mean() / narrow.mean()) < 2


def test_choosing_all_ranks_is_uploading_all():
    clients = toy_clients(6, RANK)
    states = [played(m, 4, clients).server for m in (replace(M, shared_rank=RANK), LoRAA2(RANK, b_rate=2.0, upload="all"))]
    for key, x in pack(states[0].adapter).items():
        assert torch.equal(x, pack(states[1].adapter)[key])


def test_the_choice_depends_on_the_released_mean_and_not_on_uploads_or_clients():
    """Two sets of clients, which have large and different changes, with the same mean."""
    server, rnd, m = server_with([5, 1, 1, 9, 3, 1, 8, 1]), ROUNDS["b"], replace(M, shared_rank=2)
    replies = [replace(reply, weight=1.0) for reply in replies_of(server, toy_clients(2, RANK), rnd, m)]
    noise = 10 * torch.randn(replies[0].upload.values["changes"].shape, generator=torch.Generator().manual_seed(0))
    others = [
        replace(reply, client=client, upload=Upload({"changes": reply.upload.values["changes"] + sign * noise}))
        for reply, sign, client in zip(replies, (1, -1), toy_clients(4, RANK)[2:], strict=True)
    ]
    states = [merge(m, server, some, SPEC).server for some in (replies, others)]
    choices = [
        m.send(state, client, Round(index, 0))["shared ranks"].tolist()
        for index in (2, 3)
        for state in states
        for client in (*toy_clients(4, RANK), ClientInfo("new", 1, 5))
    ]
    assert all(choice == choices[0] for choice in choices[:10]) and all(choice == choices[10] for choice in choices[10:])
    assert choices[0] != choices[10]


def test_in_the_first_rounds_all_ranks_have_their_turn():
    server: Any = M.init_server(SPEC, 0)
    for index in range(2 * RANK):
        assert M.send(server, ClientInfo("0", RANK, 1), Round(index, 0))["shared ranks"].tolist() == [
            index // 2,
            RANK + index // 2,
        ]
        server = merge(M, server, replies_of(server, toy_clients(2, RANK), Round(index, 0)), SPEC).server
    assert all(bool((x > 0).all()) for x in server.scores.values())


def test_ranks_for_which_all_clients_were_too_small_have_their_turn_again():
    m = replace(M, shared_rank=2)
    server: Any = m.init_server(SPEC, 0)
    for index in range(2 * RANK):
        assert server.first("a" if index % 2 else "b", 1).tolist() == [index // 2, RANK + index // 2]
        replies = replies_of(server, toy_clients(2, 1), Round(index, 0), m)
        server = merge(m, server, replies, SPEC).server
    assert all(bool((x > 0).all()) for x in server.scores.values())


def test_a_run_continued_from_its_saved_state_is_the_undisturbed_run(tmp_path):
    method, clients = with_head(M, "averaged"), toy_clients(6, [1, 2, 4, 4, 3, 2])
    whole = played(method, 6, clients)
    (tmp_path / "state").write_bytes(encode_state(played(method, 3, clients)))
    resumed = played(method, 6, clients, decode_state(str(tmp_path / "state"))[0], 3)
    assert encode_state(resumed) == encode_state(whole)


def test_the_gate_takes_as_many_changes_as_the_chosen_ranks_have_entries():
    server, rnd = server_with([5, 1, 1, 9, 3, 1, 8, 1]), ROUNDS["b"]
    (reply,) = replies_of(server, toy_clients(1, 1), rnd)
    changes = reply.upload.values["changes"]
    assert rejection(M, server, reply, SPEC) == ""
    assert "sent changes with shape" in rejection(M, server, replace(reply, upload=Upload({"changes": changes[1:]})), SPEC)
    positions = {"positions": torch.zeros(1, dtype=torch.uint8)}
    assert "unexpected choice/positions" in rejection(
        M, server, replace(reply, upload=Upload({"changes": changes}, positions)), SPEC
    )


def test_a_new_client_sees_the_adapter_without_the_choice():
    server = server_with([5, 1, 1, 9, 3, 1, 8, 1])
    known: ClientRound = known_of(M, server, reply_from(ClientInfo("0", 2, 1), ROUNDS["b"]), SPEC)
    assert pack(M.view(known.initial, known.download, known.client)).keys() == pack(server.adapter).keys()


def test_settings_that_contradict_each_other_are_rejected():
    with pytest.raises(ValueError, match="shared_rank = 5: expected at most 4"):
        LoRAA2(rank=4, shared_rank=5)
    with pytest.raises(ValueError, match="upload = 'all': with shared_rank, all clients upload the same ranks"):
        LoRAA2(rank=4, shared_rank=2, upload="all")
