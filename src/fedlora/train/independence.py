"""Tests whether clients of this model trained in one step get the same results as each of them alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedlora.adapter import Adapter, lora_init, pack
from fedlora.config.sections import Train
from fedlora.errors import UserError
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import Fit
from fedlora.models.adapted import AdaptedModel
from fedlora.parts.dense import Dense
from fedlora.randomness import generator
from fedlora.tasks.task import Examples, Task
from fedlora.train.batched import train_together
from fedlora.train.evaluate import score
from fedlora.train.job import Job

_WORDS = ((1, 4), (9, 2, 1), (3,), (6, 1))
"""Number of words in each example of each client."""
_VOCABULARY = ("the", "first", "of", "many", "words", "that", "some", "people", "said", "here", "was", "right")
_RATE = 2.0**14
"""Learning rate, large enough to compute the gradient from the result of a step."""
_UNCHANGED = 1e-4
"""The largest relative difference of results of the same operations, of which some may not be deterministic."""
_STEP = Train(optimizer="sgd", lr=_RATE, weight_decay=0.0, clip_norm=None, epochs=1, batch_size=8)
"""One step with all examples of a client."""


def safe_clients_per_step(
    adapted: AdaptedModel, task: Task, tokenizer: Any, clients_per_step: int, max_length: int, private: bool = False
) -> int:
    """`clients_per_step`, or 1 for a model whose clients in one step influence each other beyond rounding.

    They influence each other if the first axis of a tensor in the model is not that of the rows. The test trains, with
    dropout, and evaluates two to four clients of unequal ranks, rows and lengths. The packed form is disabled if its
    results differ from those of the padded form.

    Rounding in bf16 is coarse, and would hide a weak influence. If `private`, each client's results are therefore also
    compared with those beside other clients of the same sizes: then the operations are the same, and so is the rounding.

    Raises:
        UserError: a single client cannot be trained.
    """
    trial, packs = _Trial.of(adapted, task, tokenizer, max_length), adapted.packing.works
    each = [[job] for job in trial.jobs]
    groups = [trial.jobs[:n] for n in range(2, min(clients_per_step, len(each)) + 1)]
    adapted.packing.works = False
    try:
        alone = [trial.results(one)[0] for one in each]
    except Exception as error:  # any error of the architecture
        kind = getattr(getattr(adapted.model, "config", None), "model_type", type(adapted.model).__name__)
        reason = next(iter(str(error).splitlines()), "")
        raise UserError(f"models of type {kind!r} cannot be trained: {type(error).__name__}: {reason}") from error
    tolerance = torch.finfo(adapted.dtype).eps ** 0.4
    for tried, adapted.packing.works in ((groups, packs), (groups, False), (each, packs), (each, False)):
        if tried and trial.agrees(alone, tried, tolerance, private):
            break
    adapted.load_clients([])
    return clients_per_step if tried is groups else 1


@dataclass(frozen=True)
class _Trial:
    """Four clients with one batch each, and with different, large adapters and heads."""

    adapted: AdaptedModel
    task: Task
    examples: Examples
    jobs: Sequence[Job]

    @staticmethod
    def of(adapted: AdaptedModel, task: Task, tokenizer: Any, max_length: int) -> "_Trial":
        words = [n for own in _WORDS for n in own]
        texts = [" ".join(_VOCABULARY[(5 * i + j) % len(_VOCABULARY)] for j in range(n)) for i, n in enumerate(words)]
        examples = task.encode(tokenizer, task.made_up(texts, adapted.spec.classes), max_length)
        rows = torch.split(torch.arange(len(texts)), [len(own) for own in _WORDS])
        jobs = [
            Job(Fit(_start(adapted, i), frozenset("baw")), own, seed=i, shared_order_seed=0) for i, own in enumerate(rows)
        ]
        return _Trial(adapted, task, examples, jobs)

    def results(self, group: Sequence[Job]) -> list[Mapping[str, Tensor]]:
        """Each client's losses in training and in evaluation, and its gradients."""
        device = next(self.adapted.model.parameters()).device
        forked = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=forked):  # the seed differs between groups, to detect a model that uses it
            torch.manual_seed(len(group))
            trained = train_together(self.adapted, self.task, self.examples, group, _STEP, 1 << 20, dropout=0.5)
        asked = [(job.rows, job.request.start) for job in group]
        evaluated = score(self.adapted, self.task, self.examples, asked, len(self.examples))
        found: list[Mapping[str, Tensor]] = []
        for (_, start), one, measured in zip(asked, trained, evaluated, strict=True):
            before, after = pack(start), pack(one.adapter)
            losses = {"loss": torch.tensor(one.loss), "evaluated": torch.tensor(self.task.metrics(measured)["loss"])}
            found.append({**losses, **{key: (x - after[key]) / _RATE for key, x in before.items()}})
        return found

    def separates(self, group: Sequence[Job]) -> bool:
        """Whether each client gets the same results if every other one has another adapter, and other examples as long."""
        if len(group) == 1:
            return True
        found = self.results(group)
        for parity in (0, 1):
            jobs = [job if job.seed % 2 == parity else _replaced(self.adapted, job) for job in group]
            rows = torch.cat([job.rows for job in group if job.seed % 2 != parity])
            beside = replace(self, examples=_reversed(self.examples, rows)).results(jobs)
            kept = [(one, before) for job, one, before in zip(group, beside, found, strict=True) if job.seed % 2 == parity]
            if not all(_max_difference(one, before) < _UNCHANGED for one, before in kept):
                return False
        return True

    def agrees(
        self, alone: Sequence[Mapping[str, Tensor]], groups: Sequence[Sequence[Job]], tolerance: float, private: bool
    ) -> bool:
        """Whether the clients of each group get the same results together as alone, and if `private`, beside any others."""
        try:
            agree = all(
                _max_difference(one, alone[job.seed]) < tolerance
                for group in groups
                for job, one in zip(group, self.results(group), strict=True)
            )
            return agree and (not private or self.separates(groups[-1]))
        except torch.OutOfMemoryError:  # which says nothing about the architecture
            raise
        except Exception:  # as above
            return False


def _replaced(adapted: AdaptedModel, job: Job) -> Job:
    """The job with another adapter of the same rank."""
    return replace(job, request=replace(job.request, start=_start(adapted, job.seed + len(_WORDS))))


def _reversed(examples: Examples, rows: Tensor) -> Examples:
    """The examples with the inputs of these rows reversed along all axes; their targets are the same."""
    features = {name: flat.clone() for name, flat in examples.features.items()}
    for row in rows.tolist():
        own = slice(int(examples.starts[row]), int(examples.starts[row + 1]))
        for flat in features.values():
            flat[own] = flat[own].flip(tuple(range(flat.ndim)))
    return replace(examples, features=features)


def _start(adapted: AdaptedModel, client: int) -> Adapter:
    """An adapter whose output is as large as the base's, and a head that differs between clients."""
    rng, start = generator(client, "independence"), dict[str, Any]()
    for name, part in lora_init(replace(adapted.spec, init="uniform"), 1 + client % 2, client).items():
        start[name] = LowRank((torch.randn(part.b.shape, generator=rng) / 2).to(part.b), part.a)
    for name, w in adapted.spec.head.items():
        start[name] = Dense(w + (torch.randn(w.shape, generator=rng) / 10).to(w))
    return start


def _max_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest relative difference of a tensor; for tensors of small norm, relative to the norms of the others."""
    norms = {key: x.double().norm() for key, x in expected.items()}
    floor = torch.stack(list(norms.values())).square().mean().sqrt() / 20
    relative = {key: (found[key].double() - x).norm() / max(norms[key], floor) for key, x in expected.items()}
    return float(torch.stack(list(relative.values())).max())
