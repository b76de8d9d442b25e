"""What a model or a trainer does not know is refused, never ignored."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from batched_jobs import drawn, jobs, session  # noqa: F401  (a fixture)
from fedlora.adapter import Adapter, AdapterSpec, Tensors, pack
from fedlora.config.sections import Train
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Fit, FitRequest, Gradient, Round
from fedlora.methods.averaging import FactorAveraging
from fedlora.models.adapted import AdaptedModel
from fedlora.parts.dense import Dense
from fedlora.parts.experts import Experts
from fedlora.parts.heads import Heads
from fedlora.parts.three_factor import ThreeFactor
from fedlora.rounds.client import ClientStart, train_clients
from fedlora.tasks.classification import Classification
from fedlora.tasks.task import Examples
from fedlora.train.batched import train_together
from fedlora.train.job import Job
from fedlora.train.local import LocalTrainer

from toy import SPEC, ToyTrainer

TASK, WHO = Classification(), ClientInfo("x", 2, 9)
ClientResult = Callable[[Fit | Gradient], Any]


@dataclass(frozen=True)
class Scaled(LowRank):
    """A kind of part that nobody has taught the layers."""

    magnitude: float = 1.0


def start_of(spec: AdapterSpec) -> Adapter:
    pairs = {n: LowRank(torch.ones(out, 2), torch.ones(2, in_)) for n, (out, in_) in spec.modules.items()}
    return {**pairs, **{name: Dense(w) for name, w in spec.head.items()}}


@pytest.fixture(params=["model", "toy"])
def trainer(request, session) -> tuple[AdapterSpec, ClientResult]:  # noqa: F811
    """What can be adapted, and what answers a request: the trainer around a model, and the one of the laws."""
    if request.param == "toy":
        toy = ToyTrainer()
        return SPEC, lambda one: toy.fit_one(one, WHO).adapter if isinstance(one, Fit) else toy.gradient(WHO, one)
    adapted, examples = session
    local = local_trainer(adapted, examples)
    return adapted.spec, lambda one: answered(local, one) if isinstance(one, Fit) else local.gradient(WHO, one)


def local_trainer(adapted: AdaptedModel, examples: Examples) -> LocalTrainer:
    rows = {WHO.id: torch.arange(9)}
    return LocalTrainer(
        adapted, TASK, examples, rows, rows, examples, Train(batch_size=4), eval_batch_size=8, clients_per_step=2
    )


def answered(local: LocalTrainer, request: Fit) -> Adapter:
    return local.fit([FitRequest(request, WHO, 0)], Round(0, 0))[0].adapter


def other(spec: AdapterSpec, part: Any) -> dict[str, Any]:
    """The start with another part for the first module."""
    return {**start_of(spec), next(iter(spec.modules)): part}


def first(spec: AdapterSpec) -> tuple[str, int, int]:
    name, (out, in_) = next(iter(spec.modules.items()))
    return name, out, in_


def wide(spec: AdapterSpec) -> LowRank:
    _, out, in_ = first(spec)
    return LowRank(torch.ones(out + 1, 2), torch.ones(2, in_))


def pair(spec: AdapterSpec) -> LowRank:
    _, out, in_ = first(spec)
    return LowRank(torch.ones(out, 2), torch.ones(2, in_))


def scaled(spec: AdapterSpec) -> Scaled:
    return Scaled(**vars(pair(spec)))


ANY: dict[str, tuple[Callable[[AdapterSpec], dict[str, Any]], str]] = {
    "a factor that no part has": (lambda s: {"train": frozenset("bc")}, r"train = \['b', 'c'\]: expected some of"),
    "no factor": (lambda s: {"train": frozenset()}, r"train = \[\]"),
    "no part": (lambda s: {"start": {}}, "train = "),
    "a kind that is not supported": (lambda s: {"start": other(s, scaled(s))}, "parts of kind Scaled are not supported"),
    "a module that is not adapted": (
        lambda s: {"start": {**start_of(s), "no.such": pair(s)}},
        "'no.such': the model has no",
    ),
    "a head that is not there": (
        lambda s: {"start": {**start_of(s), "no.w": Dense(torch.ones(2))}},
        "'no.w': the model has",
    ),
    "factors of another module's shape": (lambda s: {"start": other(s, wide(s))}, r"\.b: expected the shape \("),
    "a rank of 0": (
        lambda s: {"start": other(s, LowRank(pair(s).b[:, :0], pair(s).a[:0]))},
        r"\.b: expected the shape \(",
    ),
}
FIT: dict[str, tuple[Callable[[AdapterSpec], dict[str, Any]], str]] = {
    "no epochs": (lambda s: {"epochs": 0}, "epochs = 0: expected at least 1"),
    "less than no epochs": (lambda s: {"epochs": -1}, "epochs = -1"),
    "something beside a module that is not adapted": (
        lambda s: {"frozen_extra": {"no.such": pair(s)}},
        "frozen_extra: the model has no adapted module 'no.such'",
    ),
    "another kind beside": (
        lambda s: {"frozen_extra": {first(s)[0]: scaled(s)}},
        "frozen_extra: expected two factors .* got Scaled",
    ),
    "something beside of another shape": (
        lambda s: {"frozen_extra": {first(s)[0]: wide(s)}},
        r"frozen_extra .*\.b: expected the shape",
    ),
    "a mask of a factor that is not there": (
        lambda s: {"mask": {f"{first(s)[0]}.c": torch.tensor(True)}},
        "mask of '.*.c'",
    ),
    "a mask of numbers": (lambda s: {"mask": {f"{first(s)[0]}.b": torch.ones(1, 2)}}, "mask of '.*.b': expected a bool"),
    "a mask of another shape": (
        lambda s: {"mask": {f"{first(s)[0]}.b": torch.ones(1, 3, dtype=torch.bool)}},
        r"mask of '.*.b': expected a bool .* got torch.bool \(1, 3\)",
    ),
    "a rate of a factor that is not there": (lambda s: {"rates": {"c": 2.0}}, "rate of 'c'"),
    "a rate below 0": (lambda s: {"rates": {"b": -1.0}}, "rate of 'b' = -1.0"),
    "a rate of nan": (lambda s: {"rates": {"b": float("nan")}}, "rate of 'b' = nan"),
}
requests_of = pytest.mark.parametrize(
    ("kind", "change", "message"),
    [pytest.param(Fit, *case, id=f"train with {name}") for name, case in (ANY | FIT).items()]
    + [pytest.param(Gradient, *case, id=f"gradient with {name}") for name, case in ANY.items()],
)


@requests_of
def test_a_request_that_cannot_be_honoured_is_refused(trainer, kind, change, message):
    spec, answer = trainer
    request = kind(start_of(spec), frozenset("ba"))
    with pytest.raises(ValueError, match=message):
        answer(_changed(request, change(spec)))


def _changed(request: Fit | Gradient, fields: dict[str, Any]) -> Fit | Gradient:
    """The same with these fields, whatever their types."""
    made = object.__new__(type(request))
    made.__dict__.update({**vars(request), **fields})
    return made


def test_nothing_is_trained_if_one_of_several_requests_cannot_be_honoured(session, monkeypatch):  # noqa: F811
    adapted, examples = session
    good = Fit(start_of(adapted.spec), frozenset("ba"))
    bad = replace(good, rates={"c": 2.0})
    monkeypatch.setattr(type(TASK), "losses", lambda *_: pytest.fail("a model was called"))
    with pytest.raises(ValueError, match="rate of 'c'"):
        local_trainer(adapted, examples).fit([FitRequest(good, WHO, 0), FitRequest(bad, WHO, 0)], Round(0, 0))


def test_an_adapter_of_an_unknown_kind_is_not_evaluated_as_if_it_were_not_there(session):  # noqa: F811
    adapted, examples = session
    view = other(adapted.spec, scaled(adapted.spec))
    with pytest.raises(ValueError, match="parts of kind Scaled are not supported"):
        local_trainer(adapted, examples).scores([(WHO, view)])


@pytest.mark.parametrize("part", [pair, wide, scaled], ids=["of no adapted module", "of another shape", "of another kind"])
def test_a_change_of_the_base_that_has_no_place_is_refused(session, part):  # noqa: F811
    adapted, _ = session
    before = {name: adapted.spec.weight(name).clone() for name in adapted.layers}
    for merge, spec in ((adapted.merge_into_base, adapted.spec), (ToyTrainer().merge_into_base, SPEC)):
        name = "no.such" if part is pair else first(spec)[0]
        with pytest.raises(ValueError, match="base update"):
            merge({name: part(spec)})
    assert all(torch.equal(adapted.spec.weight(name), weight) for name, weight in before.items())


class Asking(FactorAveraging):
    """Asks its clients for a mapping."""

    def work(self, state: Any, download: Tensors, client: ClientInfo, rnd: Round) -> Any:
        yield {"start": start_of(SPEC)}


def test_a_client_that_asks_for_something_else_is_told_so():
    with pytest.raises(TypeError, match="Fit, Gradient or Features, got dict"):
        train_clients(Asking(), ToyTrainer(), [ClientStart(WHO, None, {})], Round(0, 0))


# ---------------------------------------------------------------------------------------------------- what a penalty sees


def squares(live: Tensors) -> Tensor:
    """Half the squared norm of the adapter: its gradient is the adapter."""
    return torch.stack([x.square().sum() / 2 for x in live.values()]).sum()


def parts_of(kind: type, spec: AdapterSpec) -> Adapter:
    """Random factors of this kind in all modules, and the head."""
    rng = torch.Generator().manual_seed(0)

    def some(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=rng)

    def part(out: int, in_: int) -> Any:
        if kind is Heads:
            return Heads(some(out, 4), some(2, 2, 2), some(2), some(4, in_))
        if kind is Experts:
            return Experts(some(out, 2), some(2, in_), some(5, in_), some(2, out, 2), some(2, 2, in_))
        return (
            ThreeFactor(some(out, 2), some(2, 2), some(2, in_))
            if kind is ThreeFactor
            else LowRank(some(out, 2), some(2, in_))
        )

    return {**{n: part(*size) for n, size in spec.modules.items()}, **{n: Dense(w) for n, w in spec.head.items()}}


@pytest.mark.parametrize("kind", [LowRank, ThreeFactor, Heads, Experts])
def test_a_penalty_pulls_on_every_factor_of_every_part_in_the_methods_own_scale(session, kind, monkeypatch):  # noqa: F811
    """With a loss of nothing and the gradient of the penalty, a step of plain descent shrinks each tensor: b, which is
    scale * lora_B, by scale^2 as much, as decision 8 has it."""
    adapted, examples = session
    start = parts_of(kind, adapted.spec)
    factors_of = frozenset(key.rpartition(".")[2] for key in pack(start))
    monkeypatch.setattr(
        Classification, "losses", lambda self, model, inputs, to: (0 * model(**inputs).logits.sum(1), torch.ones(len(to)))
    )
    seen: list[dict[str, Tensor]] = []

    def penalty(live: Tensors) -> Tensor:
        seen.append({key: x.detach().clone() for key, x in live.items()})
        return squares(live)

    job = Job(Fit(start, factors_of, penalties=(penalty,)), torch.arange(4), 0, 0)
    settings = Train(batch_size=4, optimizer="sgd", lr=1e-3)
    (trained,) = train_together(adapted, TASK, examples, [job], settings, 1000)
    assert len(seen) == 1
    assert_close(seen[0], pack(start))
    for key, after in pack(trained.adapter).items():
        name, _, factor = key.rpartition(".")
        scale = adapted.spec.scale(name, start[name].rank) if factor == "b" else 1.0
        assert_close(after, (1 - 1e-3 * scale**2) * pack(start)[key])


def test_the_toy_shows_a_penalty_every_factor_too():
    start, seen = parts_of(ThreeFactor, SPEC), set()

    def penalty(live: Tensors) -> Tensor:
        seen.update(live)
        return squares(live)

    ToyTrainer(steps=1).fit_one(Fit(start, frozenset("cw"), penalties=(penalty,)), WHO)
    assert seen == pack(start).keys()


# -------------------------------------------------------------------------------------------- what may be trained in a step


@pytest.mark.parametrize("field", ["train", "rates", "frozen_extra"])
def test_requests_that_differ_in_what_holds_for_a_whole_step_are_not_trained_in_one(session, field):  # noqa: F811
    adapted, examples = session
    one, two = jobs(adapted)[:2]
    values = {"train": frozenset("b"), "rates": {"b": 2.0}, "frozen_extra": drawn(adapted, 1, 0)}
    two = replace(two, request=replace(two.request, **{field: values[field]}))
    with pytest.raises(AssertionError, match="requests of several kinds"):
        train_together(adapted, TASK, examples, [one, two], Train(), 1000)


def test_heads_of_unequal_rank_are_not_trained_in_one_step_but_one_after_the_other(session):  # noqa: F811
    """Their blocks would be padded apart from their columns."""
    adapted, examples = session
    rng = torch.Generator().manual_seed(0)

    def heads(count: int, rank: int) -> Adapter:
        def some(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=rng) / 3

        ranks = count * rank
        return {
            n: Heads(some(out, ranks), some(count, rank, rank), some(count), some(ranks, in_))
            for n, (out, in_) in adapted.spec.modules.items()
        }

    starts = [heads(2, 1), heads(2, 2), heads(1, 2)]
    asked = [FitRequest(Fit(start, frozenset("cs")), WHO, 0) for start in starts]
    local = local_trainer(adapted, examples)
    together = local.fit(asked, Round(0, 0))
    alone = [local.fit([one], Round(0, 0))[0] for one in asked]
    for one, other_ in zip(together, alone, strict=True):
        assert_close(pack(one.adapter), pack(other_.adapter), rtol=1e-4, atol=1e-5)
