# ruff: noqa: F811  (a fixture)
"""Many clients in one step against each one alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from batched_jobs import RANKS, ROWS, TASK, drawn, jobs, routed, session  # noqa: F401  (a fixture)
from fedlora.adapter import Tensors, pack, pick, unpack
from fedlora.config.sections import Train
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Fit, FitRequest, Round, Trained
from fedlora.models.adapted import AdaptedModel, Scaling
from fedlora.models.dropout import ClientDropout
from fedlora.parts.experts import Experts
from fedlora.tasks.classification import Classification
from fedlora.tasks.task import Examples
from fedlora.train.batched import train_together
from fedlora.train.job import Job
from fedlora.train.local import LocalTrainer

from tiny import LABELS


def both(
    session: tuple[AdaptedModel, Examples], wanted: list[Job], settings: Train, tokens: int
) -> list[tuple[Trained, Trained]]:
    """Each job's result, trained with all others and alone."""
    adapted, examples = session
    together = train_together(adapted, TASK, examples, wanted, settings, tokens)
    return [
        (one, train_together(adapted, TASK, examples, [job], settings, 1)[0])
        for one, job in zip(together, wanted, strict=True)
    ]


WHOLE = 100_000
"""Tokens of a pass for every batch in one."""


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("tokens", [1, 60])
@pytest.mark.parametrize(
    "settings",
    [
        Train(batch_size=7, lr=1e-2, weight_decay=0.1, clip_norm=0.05, schedule="linear"),
        Train(batch_size=7, lr=0.1, optimizer="sgd", momentum=0.9),
    ],
    ids=lambda value: value.optimizer,
)
def test_a_batch_cut_into_passes_trains_as_the_whole_one(session, monkeypatch, settings, tokens, packed):
    """Penalties and corrections count once; examples have unequal numbers of targets."""
    monkeypatch.setattr(ClientDropout, "_dropout", lambda self, x, *_, **__: x)  # its masks depend on the passes
    monkeypatch.setattr(session[0].packing, "works", packed)
    adapted, examples = session
    wanted = jobs(adapted, frozen_extra=frozen_extra, penalties=penalty, correction=correction)
    settings = settings.model_copy(update={"accumulate": True})
    cut, whole = (train_together(adapted, Doubled(), examples, wanted, settings, n) for n in (tokens, WHOLE))
    for one, other in zip(cut, whole, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5) and one.steps == other.steps
        assert_close(pack(one.adapter), pack(other.adapter), rtol=1e-4, atol=1e-4)


def test_accumulation_limits_the_rows_of_a_pass(session):
    adapted, examples = session
    rows: list[int] = []

    class Counted(Classification):
        def losses(self, model: nn.Module, inputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
            rows.append(len(targets))
            return super().losses(model, inputs, targets)

    for accumulate in (False, True):
        settings = Train(batch_size=8, accumulate=accumulate)
        train_together(adapted, Counted(), examples, jobs(adapted)[:1], settings, 1)
    assert rows == [8, 1, *[1] * 9]


def correction(adapted: AdaptedModel, client: int) -> dict[str, Tensor]:
    name = next(iter(adapted.spec.modules))
    return {f"{name}.b": torch.full((adapted.spec.modules[name][0], RANKS[client]), 0.01)}


def frozen_extra(adapted: AdaptedModel, client: int) -> dict[str, LowRank]:
    return drawn(adapted, 1 + client, 50 + client)


def penalty(adapted: AdaptedModel, client: int) -> Any:
    def of_products_and_heads(live: Tensors) -> Tensor:
        parts = [f.product() for f in unpack(pick(live, "ba"), LowRank).values()]
        return (client + 1) * torch.stack([x.square().sum() for x in (*parts, *pick(live, "w").values())]).sum()

    return (of_products_and_heads,)


@pytest.mark.parametrize("tokens", [200, 100_000])
@pytest.mark.parametrize(
    ("settings", "request_"),
    [
        (Train(batch_size=4, lr=1e-2, epochs=2, weight_decay=0.1), {}),
        (Train(batch_size=4, lr=0.1, optimizer="sgd", clip_norm=0.05, batches="random"), {}),
        (Train(batch_size=4, lr=1e-2), {"frozen_extra": frozen_extra, "penalties": penalty}),
        (Train(batch_size=4, lr=1e-2), {"train": "b"}),
        (Train(batch_size=4, lr=1e-2, schedule="cosine", warmup=2, weight_decay=0.1), {"penalties": penalty}),
        (Train(batch_size=4, lr=0.1, optimizer="sgd", momentum=0.9, schedule="linear", warmup=0.3, epochs=2), {}),
    ],
    ids=["adamw", "sgd and clipping", "companions and penalties", "b alone", "cosine", "momentum and linear"],
)
def test_clients_trained_together_train_as_if_alone(session, settings, request_, tokens):
    """Unequal ranks, rows and lengths, dropout in the model and in the LoRA layers, clients that end before others."""
    for one, alone in both(session, jobs(session[0], **request_), settings, tokens):
        assert one.steps == alone.steps
        assert_close(one.loss, alone.loss, rtol=1e-5, atol=1e-6)
        # a hundredth of a step: AdamW makes steps of one size of gradients near zero, and so of their rounding
        assert_close(pack(one.adapter), pack(alone.adapter), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [200, 100_000])
@pytest.mark.parametrize(
    "settings",
    [
        Train(batch_size=4, lr=1e-2, epochs=2, weight_decay=0.1),
        Train(batch_size=4, lr=0.1, optimizer="sgd", clip_norm=0.05),
    ],
    ids=["adamw", "sgd and clipping"],
)
def test_experts_trained_together_train_as_if_alone_and_leave_the_others(session, settings, tokens):
    wanted = [routed(job, 2, i) for i, job in enumerate(jobs(session[0]))]
    for job, (one, alone) in zip(wanted, both(session, wanted, settings, tokens), strict=True):
        assert_close(one.loss, alone.loss, rtol=1e-5, atol=1e-6)
        assert_close(pack(one.adapter), pack(alone.adapter), rtol=1e-4, atol=1e-5)
        for name, part in job.request.start.items():
            if isinstance(part, Experts):
                trained = one.adapter[name]
                assert trained.others_b is part.others_b and trained.others_a is part.others_a
                assert all(not torch.equal(getattr(trained, k), getattr(part, k)) for k in "bag")


def test_the_trainer_answers_and_evaluates_adapters_of_several_forms_at_once(session):
    adapted, examples = session
    some = jobs(adapted)
    some = [some[0], routed(some[1], 2, 1), routed(some[2], 1, 2), routed(some[3], 2, 3)]
    clients = [ClientInfo(name, rank, len(job.rows)) for name, rank, job in zip("wxyz", RANKS, some, strict=True)]
    rows = {one.id: job.rows for one, job in zip(clients, some, strict=True)}
    asked = [FitRequest(job.request, one, 0) for one, job in zip(clients, some, strict=True)]
    trainers = [
        LocalTrainer(adapted, TASK, examples, rows, rows, examples, Train(batch_size=4), 8, clients_per_step)
        for clients_per_step in (1, 3)
    ]
    for alone, grouped in zip(*(trainer.fit(asked, Round(3, 1)) for trainer in trainers), strict=True):
        assert_close(pack(grouped.adapter), pack(alone.adapter), rtol=1e-4, atol=1e-5)
    evaluated = [
        trainer.scores([(one, job.request.start) for one, job in zip(clients, some, strict=True)]) for trainer in trainers
    ]
    for alone, grouped in zip(*evaluated, strict=True):
        assert TASK.metrics(grouped) == pytest.approx(TASK.metrics(alone), rel=1e-4)


def test_training_moves_what_is_compared(session):
    adapted, examples = session
    job = jobs(adapted)[0]
    (trained,) = train_together(adapted, TASK, examples, [job], Train(batch_size=4, lr=1e-2), 100)
    start = pack(job.request.start)
    assert all((x - start[key]).abs().max() > 1e-3 for key, x in pack(trained.adapter).items())


def test_ranks_that_only_other_clients_have_stay_zero(session):
    adapted, examples = session
    some = [replace(job, rows=ROWS[0]) for job in jobs(adapted, (2, 4))]
    train_together(adapted, TASK, examples, some, Train(batch_size=4, lr=1e-2, weight_decay=0.1), 1000)
    for layer in adapted.layers.values():
        assert not layer.part.b[0, :, 2:].any() and not layer.part.a[0, 2:].any()
        assert layer.part.b[0, :, :2].all() and layer.part.b[1].all()


def test_a_base_in_bf16_trains_fp32_factors_to_nearly_the_same_place(session):
    exact, examples = session
    model, _, _ = TASK.load(exact.model.config.name_or_path, LABELS, seed=0)
    coarse = AdaptedModel(model, Scaling(16.0), dropout=0.1, head=["classifier"], precision=torch.bfloat16)
    settings = Train(batch_size=4, lr=0.1, optimizer="sgd")
    found = [train_together(each, TASK, examples, jobs(exact), settings, 200) for each in (exact, coarse)]
    for job, one, other in zip(jobs(exact), *found, strict=True):
        start, near, far = pack(job.request.start), pack(one.adapter), pack(other.adapter)
        assert one.loss == pytest.approx(other.loss, rel=0.03)
        assert all(x.dtype == torch.float32 for x in far.values())
        moved, apart = (sum(float((x - y[key]).square().sum()) for key, x in near.items()) for y in (start, far))
        assert apart < 0.01 * moved


def test_the_trainer_groups_requests_and_answers_in_their_order(session):
    adapted, examples = session
    names = "wxyz"
    rows = dict(zip(names, ROWS, strict=True))
    asked = [
        FitRequest(
            Fit(job.request.start, frozenset("b" if i == 1 else "ba")), ClientInfo(names[i], RANKS[i], len(job.rows)), 0
        )
        for i, job in enumerate(jobs(adapted))
    ]
    results = [
        LocalTrainer(adapted, TASK, examples, rows, rows, examples, Train(batch_size=4), 8, clients_per_step).fit(
            asked, Round(3, 1)
        )
        for clients_per_step in (1, 3)
    ]
    for alone, grouped, one in zip(*results, asked, strict=True):
        assert_close(pack(grouped.adapter), pack(alone.adapter), rtol=1e-4, atol=1e-5)
        assert grouped.loss == pytest.approx(alone.loss, rel=1e-5) and grouped.steps == alone.steps > 0
        assert next(iter(alone.adapter.values())).rank == one.client.rank


def test_clients_evaluated_together_are_evaluated_as_if_alone(session):
    adapted, examples = session
    rows = dict(zip("wxyz", [ROWS[0], ROWS[1], ROWS[2][:0], ROWS[3]], strict=True))
    asked = [(ClientInfo(n, r, 5), job.request.start) for n, r, job in zip("wxyz", RANKS, jobs(adapted), strict=True)]
    one, three = (
        LocalTrainer(adapted, TASK, examples, rows, rows, examples, Train(), 8, clients_per_step).scores(asked)
        for clients_per_step in (1, 3)
    )
    assert [score and score.examples for score in three] == [9, 21, None, 10]
    for left, right in zip(one, three, strict=True):
        assert_close(left and dict(left.sums), right and dict(right.sums), rtol=1e-5, atol=1e-6)


class Doubled(Classification):
    """Counts each example of the first label as two targets of the same loss."""

    def losses(self, model: nn.Module, inputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        found, ones = super().losses(model, inputs, targets)
        targets_of_each = ones + (targets == 0)
        return found * targets_of_each, targets_of_each


def test_an_example_with_two_targets_counts_twice(session, monkeypatch):
    monkeypatch.setattr(ClientDropout, "_dropout", lambda self, x, *_, **__: x)  # its masks would depend on the rows
    adapted, examples = session
    settings, wanted = Train(batch_size=64, lr=0.1, optimizer="sgd"), jobs(adapted)
    ours = train_together(adapted, Doubled(), examples, wanted, settings, 100_000)
    for job, found in zip(wanted, ours, strict=True):
        again = job.rows[examples.targets[job.rows] == 0]
        twice = replace(job, rows=torch.cat([job.rows, again]))
        (expected,) = train_together(adapted, TASK, examples, [twice], settings, 100_000)
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert_close(pack(found.adapter), pack(expected.adapter), rtol=1e-4, atol=1e-6)
    assert any((examples.targets[job.rows] == 0).any() for job in wanted)
