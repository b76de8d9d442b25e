"""Many clients in one step against each one alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from fedlora.adapter import Adapter, Dense, Tensors, lora_init, pack, pick, unpack
from fedlora.config.sections import Train
from fedlora.data.files import columns
from fedlora.linalg.lowrank import Experts, LowRank
from fedlora.messages import ClientInfo, Fit, FitRequest, Round
from fedlora.models.adapted import AdaptedModel, Scaling
from fedlora.models.dropout import ClientDropout
from fedlora.tasks.classification import Classification, Encoded
from fedlora.train.batched import Job, Trained, bytes_per_token, passes, train_together
from fedlora.train.features import try_packing
from fedlora.train.local import LocalTrainer

from tiny import LABELS, tiny_bert, tiny_rows

TASK = Classification()
ROWS = [torch.arange(0, 9), torch.arange(9, 30), torch.arange(30, 34), torch.arange(34, 44)]  # 3, 6, 1 and 3 batches
RANKS = (2, 4, 1, 4)


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> tuple[AdaptedModel, Encoded]:
    """A model that packs its examples; test_packing.py compares with padded ones."""
    folder = tmp_path_factory.mktemp("batched")
    model, tokenizer, _ = TASK.load(str(tiny_bert(folder / "model")), LABELS, seed=0)
    table = columns(tiny_rows(folder / "rows.jsonl", 44), "data.source")
    table["label"] = [LABELS.index(label) for label in table["label"]]
    adapted = AdaptedModel(model, Scaling(16.0), dropout=0.1, head=["classifier"])
    try_packing(adapted, TASK, tokenizer, 64)
    return adapted, TASK.encode(tokenizer, table, 64)


def drawn(adapted: AdaptedModel, rank: int, seed: int) -> dict[str, LowRank]:
    """Factors whose b is not zero."""
    rng = torch.Generator().manual_seed(seed)
    return {
        n: LowRank(torch.randn(p.b.shape, generator=rng) / 9, p.a) for n, p in lora_init(adapted.spec, rank, seed).items()
    }


def jobs(adapted: AdaptedModel, ranks: tuple[int, ...] = RANKS, train: str = "baw", **request: Any) -> list[Job]:
    """Clients of different ranks, heads and numbers of rows."""
    found = []
    for i, rank in enumerate(ranks):
        head: Adapter = {name: Dense(w + 0.01 * i) for name, w in adapted.spec.head.items()}
        fit = Fit({**drawn(adapted, rank, i), **head}, frozenset(train), **{k: v(adapted, i) for k, v in request.items()})
        found.append(Job(fit, ROWS[i], seed=i, shared_order_seed=7))
    return found


def both(
    session: tuple[AdaptedModel, Encoded], wanted: list[Job], settings: Train, tokens: int
) -> list[tuple[Trained, Trained]]:
    """Each job's result, trained with all others and alone."""
    adapted, examples = session
    together = train_together(adapted, TASK, examples, wanted, settings, tokens)
    return [
        (one, train_together(adapted, TASK, examples, [job], settings, 1)[0])
        for one, job in zip(together, wanted, strict=True)
    ]


def frozen_extra(adapted: AdaptedModel, client: int) -> dict[str, LowRank]:
    return drawn(adapted, 1 + client, 50 + client)


def penalty(adapted: AdaptedModel, client: int) -> Any:
    def of_products_and_heads(live: Tensors) -> Tensor:
        parts = [f.product() for f in unpack(pick(live, "ba"), LowRank).values()]
        return (client + 1) * torch.stack([x.square().sum() for x in (*parts, *pick(live, "w").values())]).sum()

    return of_products_and_heads


@pytest.mark.parametrize("tokens", [200, 100_000])
@pytest.mark.parametrize(
    ("settings", "request_"),
    [
        (Train(batch_size=4, lr=1e-2, epochs=2, weight_decay=0.1), {}),
        (Train(batch_size=4, lr=0.1, optimizer="sgd", clip_norm=0.05, batches="random"), {}),
        (Train(batch_size=4, lr=1e-2), {"frozen_extra": frozen_extra, "penalty": penalty}),
        (Train(batch_size=4, lr=1e-2), {"train": "b"}),
    ],
    ids=["adamw", "sgd and clipping", "companions and penalties", "b alone"],
)
def test_clients_trained_together_train_as_if_alone(session, settings, request_, tokens):
    """Unequal ranks, rows and lengths, dropout in the model and in the LoRA layers, clients that end before others."""
    for one, alone in both(session, jobs(session[0], **request_), settings, tokens):
        assert one.steps == alone.steps
        assert_close(one.loss, alone.loss, rtol=1e-5, atol=1e-6)
        # a hundredth of a step: AdamW makes steps of one size of gradients near zero, and so of their rounding
        assert_close(pack(one.adapter), pack(alone.adapter), rtol=1e-4, atol=1e-4)


def routed(job: Job, others: int, seed: int) -> Job:
    """The same job with more experts and a router."""
    rng, start = torch.Generator().manual_seed(seed), dict(job.request.start)
    for name, part in start.items():
        if isinstance(part, LowRank):
            (out, rank), in_ = part.b.shape, part.a.shape[1]
            sizes = (2 * others + 1, in_), (others, out, rank), (others, rank, in_)
            start[name] = Experts(part.b, part.a, *(torch.randn(size, generator=rng) / 3 for size in sizes))
    return replace(job, request=replace(job.request, start=start, train=frozenset("bagw")))


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
    for (alone, _), (grouped, _) in zip(*(trainer.fit(asked, Round(3, 1)) for trainer in trainers), strict=True):
        assert_close(pack(grouped), pack(alone), rtol=1e-4, atol=1e-5)
    evaluated = [
        trainer.scores([(one, job.request.start) for one, job in zip(clients, some, strict=True)]) for trainer in trainers
    ]
    for alone, grouped in zip(*evaluated, strict=True):
        assert grouped.metrics == pytest.approx(alone.metrics, rel=1e-4)


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
        assert not layer.b[0, :, 2:].any() and not layer.a[0, 2:].any()
        assert layer.b[0, :, :2].all() and layer.b[1].all()


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
    for (alone, notes), (grouped, other), one in zip(*results, asked, strict=True):
        assert_close(pack(grouped), pack(alone), rtol=1e-4, atol=1e-5)
        assert_close(other, notes)
        assert next(iter(alone.values())).rank == one.client.rank


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
        assert_close(left and dict(left.metrics), right and dict(right.metrics), rtol=1e-5, atol=1e-6)


def test_passes_take_every_batch_once_and_similar_lengths_together():
    sizes = [(9, 4), (30, 4), (10, 4), (31, 2), (8, 4)]
    found = list(passes(sizes, tokens=120))
    assert found == [[0, 2, 4], [1], [3]]
    assert list(passes(sizes, tokens=10_000)) == [[0, 1, 2, 3, 4]]
    assert sorted(passes(sizes, tokens=1)) == [[0], [1], [2], [3], [4]]


def test_the_memory_of_a_token_is_that_of_what_is_kept_for_the_backward_pass(session):
    adapted, examples = session
    found = bytes_per_token(adapted, TASK, examples, drawn(adapted, 4, 0))
    hidden, layers = 32, 2
    assert 4 * hidden * layers * 8 < found < 4 * hidden * layers * 80
    assert all(layer.b is None for layer in adapted.layers.values())  # the model is as it was
    nothing = replace(examples, starts=examples.starts[:1])
    assert bytes_per_token(adapted, TASK, nothing, drawn(adapted, 4, 0)) == 1


# ------------------------------------------------------------------------------------------------------------------ dropout


def masks(shapes: list[tuple[int, int]], seeds: list[int], width: int = 50, p: float = 0.3) -> list[Tensor]:
    """Each client's own part [rows, length, width] of ones after dropout."""
    run, longest = max(rows for _, rows in shapes), max(length for length, _ in shapes)
    with ClientDropout() as chance:
        chance.next_pass([torch.Generator().manual_seed(seed) for seed in seeds], shapes)
        dropped = functional.dropout(torch.ones(len(shapes) * run, longest, width), p)
    parts = dropped.unflatten(0, (len(shapes), run))
    return [part[:rows, :length] for part, (length, rows) in zip(parts, shapes, strict=True)]


def test_a_mask_is_the_clients_own_whoever_is_beside_it():
    alone, other = masks([(7, 3)], [5])[0], masks([(7, 3)], [6])[0]
    assert torch.equal(masks([(9, 4), (7, 3), (2, 1)], [1, 5, 2])[1], alone)
    assert not torch.equal(alone, other)


def test_a_mask_of_flattened_tokens_is_that_of_the_same_tokens_in_rows():
    tokens = torch.ones(3 * 4, 9, 50)
    for x in (tokens, tokens.flatten(0, 1)):
        with ClientDropout() as chance:
            chance.next_pass([torch.Generator().manual_seed(seed) for seed in (1, 5, 2)], [(9, 4), (7, 3), (2, 1)])
            dropped = functional.dropout(x, 0.3).view_as(tokens)
        for client, (length, rows) in enumerate([(9, 4), (7, 3), (2, 1)]):
            own = dropped.unflatten(0, (3, 4))[client, :rows, :length]
            assert torch.equal(own, masks([(length, rows)], [(1, 5, 2)[client]])[0])


def test_what_has_no_rows_is_dropped_out_of_one_client_only():
    """A table of positions, for instance, which all rows have in common."""
    table = torch.ones(24, 50)  # which two clients could share out evenly
    with ClientDropout() as chance:
        chance.next_pass([torch.Generator().manual_seed(1)], [(7, 3)])
        assert float((functional.dropout(table, 0.5) == 0).float().mean()) == pytest.approx(0.5, abs=0.1)
        chance.next_pass([torch.Generator().manual_seed(i) for i in range(2)], [(7, 3), (5, 1)])
        with pytest.raises(ValueError, match=r"\[24, 50\] is dropped out"):
            functional.dropout(table, 0.5)


def test_the_kept_part_is_scaled_and_of_the_right_size():
    (found,) = masks([(100, 20)], [0])
    assert found.unique().tolist() == pytest.approx([0.0, 256 / (256 - 77)])  # 0.3 is nearest to 77 / 256
    assert float(found.mean()) == pytest.approx(1.0, abs=0.01)


def test_attention_with_dropout_of_nothing_is_torchs_and_with_dropout_right_on_average():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 6, 8)
    hidden = torch.rand(2, 1, 6, 6) < 0.3
    for named in ({}, {"is_causal": True}, {"attn_mask": ~hidden | torch.eye(6, dtype=torch.bool)}, {"scale": 0.5}):
        plain = functional.scaled_dot_product_attention(query, key, value, **named)
        with ClientDropout() as chance:
            chance.next_pass([torch.Generator().manual_seed(1)], [(6, 2)])
            same = functional.scaled_dot_product_attention(query, key, value, **named)
            many = [functional.scaled_dot_product_attention(query, key, value, dropout_p=0.2, **named) for _ in range(600)]
        assert torch.equal(same, plain)
        assert_close(torch.stack(many).mean(0), plain, atol=0.1, rtol=0.1)
        assert not torch.equal(many[0], many[1])


def test_the_gradient_passes_where_the_input_passed():
    x = torch.ones(4, 5, 6, requires_grad=True)
    with ClientDropout() as chance:
        chance.next_pass([torch.Generator().manual_seed(1)], [(5, 4)])
        y = functional.dropout(x, 0.5)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
