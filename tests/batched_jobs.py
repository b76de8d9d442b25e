"""Training jobs of four different clients on a tiny BERT."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedlora.adapter import Adapter, lora_init
from fedlora.data.files import columns
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import Fit
from fedlora.models.adapted import AdaptedModel, Scaling
from fedlora.parts.dense import Dense
from fedlora.parts.experts import Experts
from fedlora.parts.weight_change import WeightChange
from fedlora.tasks.classification import Classification
from fedlora.tasks.task import Examples
from fedlora.train.features import try_packing
from fedlora.train.job import Job

from tiny import LABELS, tiny_bert, tiny_rows

TASK = Classification()
ROWS = [torch.arange(0, 9), torch.arange(9, 30), torch.arange(30, 34), torch.arange(34, 44)]  # 3, 6, 1 and 3 batches
RANKS = (2, 4, 1, 4)


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> tuple[AdaptedModel, Examples]:
    """A model that packs its examples; test_packing.py compares with padded ones."""
    folder = tmp_path_factory.mktemp("batched")
    model, tokenizer, _ = TASK.load(str(tiny_bert(folder / "model")), LABELS, seed=0)
    table = columns(tiny_rows(folder / "rows.jsonl", 44), "data.source")
    table["label"] = [LABELS.index(label) for label in table["label"]]
    adapted = AdaptedModel(model, Scaling(16.0), dropout=0.1, head=["classifier"], classes=len(LABELS))
    try_packing(adapted, TASK, tokenizer, 64)
    return adapted, TASK.encode(tokenizer, table, 64)


@pytest.fixture(scope="module")
def whole(session: tuple[AdaptedModel, Examples], tmp_path_factory) -> tuple[AdaptedModel, Examples, Job]:
    """A model of which all parameters are trained, the examples of the session, and a client whose parameters are moved."""
    model, tokenizer, _ = TASK.load(str(tiny_bert(tmp_path_factory.mktemp("whole") / "model")), LABELS, seed=0)
    adapted = AdaptedModel(model, Scaling(16.0), head=["classifier"], classes=len(LABELS), whole=True)
    try_packing(adapted, TASK, tokenizer, 64)
    job, rng = unfactored(jobs(adapted)[0]), torch.Generator().manual_seed(0)
    moved = {n: Dense(p.w + torch.randn(p.w.shape, generator=rng) / 50) for n, p in job.request.start.items() if p.in_head}
    return adapted, session[1], replace(job, request=replace(job.request, start={**job.request.start, **moved}))


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


def routed(job: Job, others: int, seed: int) -> Job:
    """The same job with more experts and a router."""
    rng, start = torch.Generator().manual_seed(seed), dict(job.request.start)
    for name, part in start.items():
        if isinstance(part, LowRank):
            (out, rank), in_ = part.b.shape, part.a.shape[1]
            sizes = (2 * others + 1, in_), (others, out, rank), (others, rank, in_)
            start[name] = Experts(part.b, part.a, *(torch.randn(size, generator=rng) / 3 for size in sizes))
    return replace(job, request=replace(job.request, start=start, train=frozenset("bagw")))


def unfactored(job: Job) -> Job:
    """The same job, which trains the weights of the adapted modules themselves."""
    start = {
        n: WeightChange(part.product()) if isinstance(part, LowRank) else part for n, part in job.request.start.items()
    }
    return replace(job, request=replace(job.request, start=start, train=frozenset({"delta", "w"})))
