"""The laws that every row of the table obeys. No law asks for a method's name."""

import ast
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import pytest
import torch

from fedlora.adapter import Adapter, AdapterSpec, Scaling, Tensors
from fedlora.linalg.sparse import position_bytes
from fedlora.messages import ClientInfo, Features, Fit, FitRequest, Mean, Merged, Reply, Round, Trained, Upload
from fedlora.method import ClientRound
from fedlora.methods.row import Row
from fedlora.methods.table import TABLE
from fedlora.randomness import generator
from fedlora.rounds.codec import decode, decode_state, encode, encode_state
from fedlora.rounds.loop import one_round
from fedlora.rounds.plan import RunState
from fedlora.rounds.simulate import SimulationBackend
from fedlora.rounds.validator import Failed, template_upload

from merging import known_of, merge
from toy import DoraRow, MemoryStates, Quiet, Recorder, ToyTrainer, products, toy_clients, toy_method, toy_plan


def brief(row: Row) -> Row:
    """The row, with a period of two rounds, twenty steps of a search, a server of large steps, two clusters: enough.

    Half of the entries come down, so that some are of b after two rounds.
    """
    short = {"every": 2, "steps": 20, "server_lr": 0.05, "density_down": 0.5, "tasks": 2}
    return replace(
        row, fixed_settings={**row.fixed_settings, **{key: x for key, x in short.items() if key in row.settings()}}
    )


ROWS = {**TABLE, **{dora.name: dora for row in TABLE.values() if row.magnitudes for dora in [DoraRow.of(row)]}}
"""The rows, and with DoRA those that support it."""
CASES = {name: (brief(row), (3,)) for name, row in TABLE.items()}
DORA = {name: (brief(row), (3,)) for name, row in ROWS.items() if name not in TABLE}
MIXED = {f"{name}, mixed ranks": (brief(row), (2, 3, 1)) for name, row in ROWS.items() if row.mixed_ranks}
every_row = pytest.mark.parametrize(
    ("row", "ranks"),
    [pytest.param(*case, id=name) for name, case in CASES.items()]
    + [pytest.param(*case, id=name, marks=pytest.mark.slow) for name, case in {**DORA, **MIXED}.items()],
)
mixed_rows = pytest.mark.parametrize(("row", "ranks"), MIXED.values(), ids=MIXED)
MEANS = {name: case for name, case in CASES.items() if toy_method(case[0]).collects_mean}
PERIOD = 2  # rounds after which every brief row has done all that it ever does
ROUNDS = 2 * PERIOD


@pytest.fixture(autouse=True)
def _declared(request):
    """A law that a row says it cannot obey must indeed fail."""
    values = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if "row" in values:
        law, known_failures = request.function.__name__, values["row"].known_failures
        mixed = known_failures.get(f"{law}, mixed ranks") if len(values["ranks"]) > 1 else None
        if reason := known_failures.get(law, mixed):
            request.applymarker(pytest.mark.xfail(reason=reason, strict=True))


def test_a_row_excepts_itself_from_laws_that_exist():
    assert {law.removesuffix(", mixed ranks") for row in TABLE.values() for law in row.known_failures} <= globals().keys()


@every_row
def test_the_wire_changes_nothing(row, ranks):
    assert_same(run_rounds(row, people(ranks), backend=ThroughBytes).weights, whole_game(row.name, ranks).weights)


@every_row
def test_a_client_trained_with_others_trains_as_if_alone(row, ranks):
    alone = run_rounds(row, people(ranks), trainer=Witness(toy(clients_per_step=1)))
    assert_same(alone.weights, whole_game(row.name, ranks).weights)


@every_row
def test_the_order_of_clients_does_not_matter(row, ranks):
    assert_same(run_rounds(row, people(ranks)[::-1]).weights, whole_game(row.name, ranks).weights)


@every_row
def test_one_client_alone_trains_locally(row, ranks):
    game = run_rounds(row, people(ranks, 1))
    assert_close(game.weights["0"], game.trainer.weights["0"])


@every_row
def test_identical_clients_equal_one_client(row, ranks):
    alike = [ClientInfo(name, ranks[0], 10) for name in "vwxy"]
    game = run_rounds(row, alike, trainer=Recorder(toy(skew=0.0)))
    alone = run_rounds(row, alike[:1], trainer=Recorder(toy(skew=0.0)))
    for client in alike:
        assert_close(game.weights[client.id], alone.weights["v"])


@every_row
def test_a_client_of_weight_zero_changes_nothing(row, ranks):
    method, server, replies = a_round_of_replies(row.name, ranks)
    without = merge(method, server, replies[:-1], SPEC)
    with_zero = merge(method, server, [*replies[:-1], replace(replies[-1], weight=0.0)], SPEC)
    for client in people(ranks):
        assert_close(*(change(method, merged, client) for merged in (with_zero, without)))


@every_row
def test_factors_and_head_are_averaged_with_the_same_weights(row, ranks):
    """A client with nearly all the weight is as good as alone: in its factors, and in its head."""
    row = replace(row, head="method-managed" if row.head == "method-managed" else "averaged")
    method, server, replies, states = round_of_replies(row, ranks)
    first, rnd = replies[0], replies[0].round
    rest = [replace(reply, weight=1e-9) for reply in replies[1:]]
    both = [merge(method, server, some, SPEC) for some in ([first, *rest], [first])]
    state = states.client_state(first.client, rnd.index + 1)
    one, other = (change(method, merged, first.client, state) for merged in both)
    sizes = {name: float(x.norm()) or 1.0 for name, x in other.items()}
    assert_close(*({name: x / sizes[name] for name, x in each.items()} for each in (one, other)))
    assert any(other[name].any() for name in SPEC.modules)


@mixed_rows
def test_rounds_without_the_largest_client_still_teach_every_rank(row, ranks):
    clients = people(ranks)
    largest = [client for client in clients if client.rank == max(ranks)]
    before = run_rounds(row, [client for client in clients if client not in largest], rounds=PERIOD)
    after = run_rounds(row, largest, progress=before.progress, states=before.states, start=PERIOD, rounds=PERIOD + ROUNDS)
    for name, shape in SPEC.modules.items():
        strengths = torch.linalg.svdvals(after.weights[largest[0].id][name])
        assert strengths[min(SPEC.rank(name, max(ranks)), *shape) - 1] > 1e-5 * strengths[0]  # rounding is below 1e-6


@every_row
def test_alpha_only_scales_the_updates(row, ranks):
    """With alpha and all targets four times as large PEFT's factors see the same problem, and so do penalties on them."""
    first_upload, fourfold = (
        run_rounds(row, people(ranks), rounds=PERIOD, trainer=Witness(toy(spec=in_unit(unit), unit=unit)))
        for unit in (1.0, 4.0)
    )
    for client, weights in first_upload.weights.items():
        wanted = {name: (4 if name in SPEC.modules else 1) * x for name, x in weights.items()}
        assert_close(fourfold.weights[client], wanted)


@every_row
def test_only_the_ratio_of_weights_matters(row, ranks):
    method, server, replies = a_round_of_replies(row.name, ranks)
    scaled = [replace(reply, weight=reply.weight * 1000) for reply in replies]
    both = [merge(method, server, some, SPEC) for some in (replies, scaled)]
    for client in people(ranks):
        assert_close(*(change(method, merged, client) for merged in both))


@pytest.mark.parametrize(("row", "ranks"), MEANS.values(), ids=MEANS)
def test_a_mean_of_other_uploads_gives_the_same_state(row, ranks):
    """Two clients of equal weight send something else, but the mean of the expanded uploads is the same."""
    method, server, replies = a_round_of_replies(row.name, ranks)
    one, other, *rest = [method.expand(known_of(method, server, reply, SPEC), reply.upload) for reply in replies]
    noise = {name: torch.randn(x.shape, generator=generator(0, "other", name)).to(x) for name, x in one.items()}
    others = [{name: x + noise[name] for name, x in one.items()}, {name: x - noise[name] for name, x in other.items()}]
    means = [Mean.of([(1.0, tensors) for tensors in sent]) for sent in ([one, other, *rest], [*others, *rest])]
    both = [method.merge(server, mean, replies[0].round) for mean in means]
    for client in people(ranks):
        assert_close(*(change(method, merged, client) for merged in both))


@every_row
def test_weight_two_is_as_two_of_weight_one(row, ranks):
    method, server, replies = a_round_of_replies(row.name, ranks)
    if method.collects_mean:
        return  # a weighted mean is
    one, *rest = [replace(reply, weight=1.0) for reply in replies]
    twin = replace(one, client=replace(one.client, id="twin"))
    both = [merge(method, server, some, SPEC) for some in ([replace(one, weight=2.0), *rest], [one, *rest, twin])]
    for client in people(ranks):
        assert_close(*(change(method, merged, client) for merged in both))


@every_row
def test_unchanged_work_from_a_clients_own_state_uploads_the_template(row, ranks):
    game = run_rounds(row, people(ranks), rounds=PERIOD)
    method, rnd, trainer = toy_method(row), Round(PERIOD, 0), game.trainer
    for client in people(ranks):
        initial, download = method.init_client(SPEC, client, 0), method.send(game.progress.server, client, rnd)
        state = game.states.client_state(client, PERIOD)
        template = template_upload(method, ClientRound(SPEC, client, rnd, download, initial))
        job = method.work(initial if state is None else state, download, client, rnd)
        upload = answered(job, partial(unchanged, trainer, client))
        assert upload.values.keys() == template.values.keys()
        assert all(torch.equal(x, template.values[name]) for name, x in upload.values.items())


@every_row
def test_secure_aggregation_is_promised_exactly_where_a_mean_without_choices_is_collected(row, ranks):
    method, _, replies = a_round_of_replies(row.name, ranks)
    able = method.collects_mean and not any(reply.upload.choices for reply in replies)
    assert row.secure_sums().startswith("yes") == able


@every_row
@pytest.mark.slow
def test_a_client_that_comes_late_can_join_and_helps(row, ranks):
    game = run_rounds(row, people(ranks, 6), fraction=0.5, rounds=8)
    late = {client for r in game.rows[1:] for client in r.chosen} - set(game.rows[0].chosen)
    assert late and all(len(r.accepted) == 3 for r in game.rows)
    scores = [r.clients["accuracy"].mean for r in game.rows]
    assert scores[-1] > scores[0]


@every_row
def test_states_survive_saving_and_loading(row, ranks, tmp_path):
    game = whole_game(row.name, ranks)
    for i, state in enumerate([game.progress, *game.states.saved.values(), *game.states.base_updates.values()]):
        file = tmp_path / str(i)
        file.write_bytes(encode_state(state))
        assert encode_state(decode_state(str(file))[0]) == encode_state(state)


@every_row
def test_a_resumed_run_is_bit_for_bit_the_same(row, ranks, tmp_path):
    first = run_rounds(row, people(ranks), rounds=PERIOD)
    file = tmp_path / "server"
    file.write_bytes(encode_state(first.progress))
    second = run_rounds(row, people(ranks), progress=decode_state(str(file))[0], states=first.states, start=PERIOD)
    assert_same(second.weights, whole_game(row.name, ranks).weights)


@every_row
def test_traffic_is_what_the_row_declares(row, ranks):
    """Floats of the factors and bytes of positions; the head is the row's rule and comes on top. All clients take part."""
    clients = people(ranks)
    game = whole_game(row.name, ranks)
    head = sum(x.numel() for x in game.trainer.spec.head.values()) if row.head in ("averaged", "method-managed") else 0
    settings = {key: x for key, x in {**row.settings(), **row.fixed_settings}.items() if isinstance(x, int | float)}
    everybody = {"K": len(clients), **settings, "rank": toy_method(row).rank}
    everybody |= {"features": game.trainer.spec.features, "classes": game.trainer.spec.classes}

    def ranks_of(name: str, client: ClientInfo) -> dict[str, int]:
        each = [SPEC.rank(name, one.rank) for one in clients]
        return {"r": SPEC.rank(name, client.rank), "rank": SPEC.rank(name, everybody["rank"]), "R": sum(each)}

    def floats(formula: str, client: ClientInfo) -> int:
        sizes = [{"out": out, "in_": in_, **ranks_of(name, client)} for name, (out, in_) in SPEC.modules.items()]
        return math.floor(sum(evaluate(formula, **{**everybody, **each}) for each in sizes))

    def first_upload(r: int) -> list[int]:
        return [int(evaluate(formula, **everybody)) if r == 0 else 0 for formula in row.first_upload]

    def positions(picked: tuple[str, str] | None) -> set[int]:
        return {position_bytes(floats(picked[0], client), floats(picked[1], client)) if picked else 0 for client in clients}

    for r in range(ROUNDS):
        base_update = row.base_update if r - 1 in game.progress.base_updates.rounds else "0"
        up, down = row.up[r % len(row.up)], row.down[r % len(row.down)]
        first_floats, first_bytes = first_upload(r)
        assert game.backend.floats_up[r] == {floats(up, client) + first_floats + head for client in clients}
        assert game.backend.floats_down[r] == {
            floats(down, client) + floats(base_update, client) + head for client in clients
        }
        assert game.backend.bytes_up[r] == {size + first_bytes for size in positions(row.index_counts)}
        assert game.backend.bytes_down[r] == positions(row.index_counts_down)
    assert (row.base_update != "0") == bool(game.progress.base_updates.rounds)


@every_row
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.float64])
def test_the_dtype_is_kept(row, ranks, dtype):
    spec = replace(SPEC, head={name: x.to(dtype) for name, x in SPEC.head.items()}, dtype=dtype)
    game = run_rounds(row, people(ranks), trainer=Recorder(toy(spec=spec)), rounds=PERIOD)
    assert {x.dtype for weights in game.weights.values() for x in weights.values()} == {dtype}
    assert all(x.dtype == dtype for upload in game.backend.uploads for x in upload.values.values() if x.is_floating_point())


@every_row
def test_a_bad_upload_is_rejected_and_the_round_continues(row, ranks):
    game = run_rounds(row, people(ranks), backend=Poisoned, rounds=PERIOD)
    assert all(r.accepted == ["0", "2"] and "NaN" in r.rejected["1"] for r in game.rows)
    assert all(bool(x.isfinite().all()) for weights in game.weights.values() for x in weights.values())


@every_row
def test_merge_does_not_mutate_its_inputs(row, ranks):
    method, server, replies = a_round_of_replies(row.name, ranks)
    before = encode_state(server), [encode(reply.upload.flat()) for reply in replies]
    merge(method, server, replies, SPEC)
    assert (encode_state(server), [encode(reply.upload.flat()) for reply in replies]) == before


@every_row
@pytest.mark.slow
def test_it_learns(row, ranks):
    row = replace(row, head="averaged" if row.head == "frozen" else row.head)
    game, untrained = run_rounds(row, people(ranks), rounds=20), run_rounds(row, people(ranks), rounds=0)
    for client, view in game.views.items():
        assert game.trainer.inner.loss(view, client) < 0.8 * untrained.trainer.inner.loss(untrained.views[client], client)


@every_row
def test_a_frozen_head_never_travels_and_never_changes(row, ranks):
    game = run_rounds(replace(row, head="frozen"), people(ranks), rounds=PERIOD)
    for view in game.views.values():
        assert all(torch.equal(products(view, SPEC)[name], x) for name, x in SPEC.head.items())
    assert not any(name.startswith("head/") for upload in game.backend.uploads for name in upload.values)


@every_row
def test_an_averaged_head_is_the_weighted_mean_of_the_trained_heads(row, ranks):
    clients = people(ranks)
    game = run_rounds(replace(row, head="averaged"), clients, rounds=1)
    total = sum(client.examples for client in clients)
    heads = [(client.examples / total, products(game.trainer.last[client.id], SPEC)) for client in clients]
    mean = {name: sum(weight * head[name] for weight, head in heads) for name in SPEC.head}
    assert_close({name: products(game.views["0"], SPEC)[name] for name in SPEC.head}, mean)


@every_row
def test_a_local_head_stays_on_its_client(row, ranks):
    game = run_rounds(replace(row, head="local"), people(ranks), rounds=PERIOD)
    for client, view in game.views.items():
        assert all(
            torch.equal(products(view, SPEC)[name], products(game.trainer.last[client], SPEC)[name]) for name in SPEC.head
        )


# ------------------------------------------------------------------------------------------------------------- the players

SPEC = AdapterSpec(
    modules={"layer.2.q": (12, 7), "layer.3.q": (12, 7), "layer.10.v": (5, 9)},
    head=ToyTrainer().spec.head,
    rank_pattern={"layer.3.q": 2, "layer.10.v": 4},
    weight=lambda name: torch.randn(SPEC.modules[name], generator=generator(0, "pretrained", name)),
    features=6,
    classes=3,
)
SPEC = replace(SPEC, magnitudes={name: SPEC.weight(name).norm(dim=1) for name in SPEC.modules})
"""Two modules of one shape, one of them of a fixed rank: the first client's where ranks are mixed. The third one's fixed
rank is above all clients'."""

Sent = Mapping[ClientInfo, Tensors]


@dataclass
class Counting:
    """A backend that counts what travels: floats, and the bytes of all else."""

    inner: SimulationBackend
    floats_up: dict[int, set[int]] = field(default_factory=dict)
    floats_down: dict[int, set[int]] = field(default_factory=dict)
    bytes_up: dict[int, set[int]] = field(default_factory=dict)
    bytes_down: dict[int, set[int]] = field(default_factory=dict)
    base_updates_evaluated: dict[tuple[int, ClientInfo], int] = field(default_factory=dict)
    """What travelled with the download for evaluation already, and not again for the turn."""
    uploads: list[Upload] = field(default_factory=list)

    def clients(self) -> Sequence[ClientInfo]:
        return self.inner.clients()

    def held(self) -> Mapping[str, Sequence[int]]:
        return self.inner.held()

    def merge_into_base(self, change: Any) -> None:
        self.inner.merge_into_base(change)

    def train_clients(self, rnd: Round, sent: Sent, missed: Sent) -> Iterator[Reply | Failed]:
        down = {client: [*download.values(), *missed.get(client, {}).values()] for client, download in sent.items()}
        evaluated = self.base_updates_evaluated
        self.floats_down[rnd.index] = {floats_in(x) + evaluated.get((rnd.index, client), 0) for client, x in down.items()}
        self.bytes_down[rnd.index] = {other_bytes_in(x) for x in down.values()}
        for reply in self.inner.train_clients(rnd, sent, missed):
            if isinstance(reply, Failed):
                yield reply
                continue
            self.floats_up.setdefault(rnd.index, set()).add(floats_in(reply.upload.flat().values()))
            self.bytes_up.setdefault(rnd.index, set()).add(other_bytes_in(reply.upload.flat().values()))
            self.uploads.append(reply.upload)
            yield reply

    def evaluate(self, rnd: Round, sent: Sent, missed: Sent) -> Iterator[Any]:
        for client, tensors in missed.items():
            self.base_updates_evaluated[rnd.index, client] = sum(x.numel() for x in tensors.values())
        return self.inner.evaluate(rnd, sent, missed)


class ThroughBytes(Counting):
    """Everything is encoded and decoded on its way."""

    def train_clients(self, rnd: Round, sent: Sent, missed: Sent) -> Iterator[Reply]:
        for reply in super().train_clients(
            rnd, {client: decode(encode(download)) for client, download in sent.items()}, missed
        ):
            yield replace(reply, upload=Upload.of(decode(encode(reply.upload.flat()))))

    def evaluate(self, rnd: Round, sent: Sent, missed: Sent) -> Iterator[Any]:
        return super().evaluate(rnd, {client: decode(encode(download)) for client, download in sent.items()}, missed)


class Poisoned(Counting):
    """Client 1 sends NaN in its first tensor."""

    def train_clients(self, rnd: Round, sent: Sent, missed: Sent) -> Iterator[Reply]:
        for reply in super().train_clients(rnd, sent, missed):
            name, tensor = next(iter(reply.upload.values.items()))
            bad = {**reply.upload.values, name: torch.full_like(tensor, float("nan"))}
            yield replace(reply, upload=replace(reply.upload, values=bad)) if reply.client.id == "1" else reply


class Witness(Recorder):
    """Counts what acted beside the trained factors to the weights."""

    def fit(self, asked: Sequence[FitRequest], rnd: Round) -> list[Trained]:
        answers = super().fit(asked, rnd)
        for one in asked:
            frozen_extra = {name: part.product() for name, part in (one.request.frozen_extra or {}).items()}
            weights = self.weights[one.client.id]
            self.weights[one.client.id] = {name: w + frozen_extra.get(name, 0) for name, w in weights.items()}
        return answers


@dataclass(frozen=True)
class Game:
    """What is left after some rounds."""

    progress: RunState
    rows: Sequence[Mapping[str, Any]]
    views: Mapping[str, Adapter]
    weights: Mapping[str, Mapping[str, torch.Tensor]]
    states: MemoryStates
    backend: Any
    trainer: Recorder


def run_rounds(
    row: Row,
    clients: Sequence[ClientInfo] | None = None,
    *,
    rounds: int = ROUNDS,
    start: int = 0,
    progress: RunState | None = None,
    states: MemoryStates | None = None,
    trainer: Recorder | None = None,
    backend: type[Counting] = Counting,
    fraction: float = 1.0,
) -> Game:
    """Some rounds of the row's method on the toy; every client's view after them."""
    clients = clients or toy_clients()
    trainer, states = trainer or Witness(toy()), states or MemoryStates()
    method = toy_method(row)
    simulation = SimulationBackend(method, trainer.spec, clients, states, trainer, seed=0)
    through, plan = backend(simulation), toy_plan(method, trainer, fraction=fraction, rounds=rounds)
    progress = progress or RunState(method.init_server(trainer.spec, 0))
    for index in progress.base_updates.rounds:
        simulation.merge_into_base(states.base_update(index))
    rows = []
    for index in range(start, rounds):
        progress, logged = one_round(plan, through, states, progress, index, Quiet())
        rows.append(logged)
    rnd = Round(rounds, 0)
    views = {client.id: simulation.view(client, method.send(progress.server, client, rnd), rnd) for client in clients}
    weights = {client: trainer.inner.weights(view) for client, view in views.items()}
    return Game(progress, rows, views, weights, states, through, trainer)


def toy(**settings: Any) -> ToyTrainer:
    """The toy on the laws' modules."""
    return ToyTrainer(**{"spec": SPEC, **settings})


def in_unit(unit: float) -> AdapterSpec:
    """The laws' modules with an alpha, and with pretrained weights, in this unit."""
    magnitudes = {name: unit * x for name, x in SPEC.magnitudes.items()}
    return replace(SPEC, scaling=Scaling(3 * unit), weight=lambda name: unit * SPEC.weight(name), magnitudes=magnitudes)


def people(ranks: Sequence[int], count: int = 3) -> list[ClientInfo]:
    """The toy's clients, with these ranks in turn."""
    return toy_clients(count, [ranks[i % len(ranks)] for i in range(count)])


@cache
def whole_game(name: str, ranks: tuple[int, ...]) -> Game:
    """The rounds of a row that several laws look at and none changes."""
    return run_rounds(brief(ROWS[name]), people(ranks))


@cache
def a_round_of_replies(name: str, ranks: tuple[int, ...]) -> tuple[Any, Any, list[Reply]]:
    """Those of the row as it is, which several laws look at and none changes."""
    return round_of_replies(brief(ROWS[name]), ranks)[:3]


def round_of_replies(row: Row, ranks: Sequence[int]) -> tuple[Any, Any, list[Reply], MemoryStates]:
    """A row's method, its server's state after two rounds, the next round's replies, and the clients' states after them."""
    game = run_rounds(row, people(ranks), rounds=PERIOD)
    method, rnd = toy_method(row), Round(PERIOD, 0)
    server = game.progress.server
    sent = {client: method.send(server, client, rnd) for client in people(ranks)}
    return method, server, list(game.backend.train_clients(rnd, sent, {})), game.states


def change(method: Any, merged: Merged[Any], client: ClientInfo, state: Any = None) -> dict[str, torch.Tensor]:
    """What a client in this state, or that has never taken part, would add to the base as it was before the merge."""
    state = method.init_client(SPEC, client, 0) if state is None else state
    view = method.view(state, method.send(merged.server, client, Round(PERIOD + 1, 0)), client)
    merged_updates = {name: part.product() for name, part in (merged.base_update or {}).items()}
    return {name: x + merged_updates.get(name, 0) for name, x in products(view, SPEC).items()}


def unchanged(trainer: Any, client: ClientInfo, request: Any) -> Any:
    """The answer of a trainer that changes nothing."""
    if isinstance(request, Features):
        return trainer.features(client)
    return Trained(request.start) if isinstance(request, Fit) else request.start


def answered(job: Any, answer: Callable[[Any], Any]) -> Upload:
    """The upload of a work whose requests are all answered so."""
    try:
        request = next(job)
        while True:
            request = job.send(answer(request))
    except StopIteration as done:
        return done.value[1]


def floats_in(tensors: Iterable[torch.Tensor]) -> int:
    return sum(x.numel() for x in tensors if x.is_floating_point())


def other_bytes_in(tensors: Iterable[torch.Tensor]) -> int:
    return sum(x.nbytes for x in tensors if not x.is_floating_point())


def evaluate(formula: str, **values: float) -> float:
    """The number of floats a formula in r, rank, out, in, K, R and the settings gives."""
    tree = ast.parse(re.sub(r"\bin\b", "in_", formula), mode="eval")
    return float(eval(compile(tree, "<row>", "eval"), {"__builtins__": {}, "min": min}, values))


def assert_same(left: Mapping[str, Mapping[str, Any]], right: Mapping[str, Mapping[str, Any]]) -> None:
    """Every client's weights, bit for bit."""
    assert left.keys() == right.keys()
    for client in left:
        one, other = left[client], right[client]
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def assert_close(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> None:
    """Up to the rounding of fp32."""
    torch.testing.assert_close(dict(left), dict(right), rtol=1e-4, atol=1e-5)
