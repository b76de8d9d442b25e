"""Training one client's adapter at a time inside the resident model."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from fedlora.adapter import Adapter, pack
from fedlora.config import Train
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Fit, Round
from fedlora.randomness import derive, generator
from fedlora.train.batches import epoch
from fedlora.train.evaluate import Score, score
from fedlora.train.inject import Adapted
from fedlora.train.tasks import Encoded, Task


@dataclass(frozen=True)
class Trained:
    """What one training gave: the adapter, the mean loss over its last epoch, the steps taken."""

    adapter: Adapter
    loss: float
    steps: int


def train_one(
    adapted: Adapted, task: Task, examples: Encoded, rows: torch.Tensor, request: Fit, settings: Train, seed: int
) -> Trained:
    """Trains as `request` says on the examples `rows` [rows], with a fresh optimiser.

    Order of the examples and dropout depend on `seed` alone. The last batch of an epoch may be smaller.
    """
    parameters = adapted.load(request.start, request.train, request.beside)
    named = dict(zip([key for key in pack(request.start) if _factor(key) in request.train], parameters, strict=True))
    optimizer = _optimizer(named, request.rates or {}, settings)
    masked = [_Masked.of(named[key], mask) for key, mask in (request.mask or {}).items() if key in named]
    device = parameters[0].device
    order = generator(seed, "order")
    lengths = examples.lengths()[rows]
    losses: list[torch.Tensor] = []
    steps = 0
    adapted.model.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive(seed, "dropout"))
        for _ in range(request.epochs or settings.epochs):
            losses.clear()
            for batch in epoch(lengths, settings.batch_size, settings.batches == "by-length", order):
                inputs, targets = examples.batch(rows[batch], device)
                loss = task.loss(adapted.model, inputs, targets)
                objective = loss if request.penalty is None else loss + request.penalty(adapted.factors())
                optimizer.zero_grad()  # first: a training that did not name the head leaves its gradients behind
                objective.backward()  # type: ignore[no-untyped-call]
                for part in masked:
                    part.clear_gradient()
                if settings.clip_norm is not None:
                    nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
                optimizer.step()
                for part in masked:
                    part.put_back()
                losses.append(loss.detach() * len(batch))
                steps += 1
    mean_loss = float(torch.stack(losses).sum()) / len(rows)
    return Trained(request.restore(adapted.read(request.start, request.train)), mean_loss, steps)


def _optimizer(named: Mapping[str, nn.Parameter], rates: Mapping[str, float], settings: Train) -> torch.optim.Optimizer:
    """With one group of parameters for each factor."""
    factors: dict[str, list[nn.Parameter]] = {}
    for key, parameter in named.items():
        factors.setdefault(_factor(key), []).append(parameter)
    groups = [{"params": own, "lr": settings.lr * rates.get(factor, 1.0)} for factor, own in factors.items()]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)


@dataclass(frozen=True)
class _Masked:
    """A parameter, where it may not move, and what it is there."""

    parameter: nn.Parameter
    fixed: torch.Tensor
    before: torch.Tensor

    @staticmethod
    def of(parameter: nn.Parameter, moves: torch.Tensor) -> "_Masked":
        return _Masked(parameter, ~moves.to(parameter.device).expand_as(parameter), parameter.detach().clone())

    def clear_gradient(self) -> None:
        if self.parameter.grad is not None:
            self.parameter.grad.masked_fill_(self.fixed, 0)

    def put_back(self) -> None:
        """What weight decay has moved."""
        self.parameter.data.copy_(self.before.where(self.fixed, self.parameter.data))


def _factor(key: str) -> str:
    return key.rpartition(".")[2]


@dataclass(frozen=True)
class LocalTrainer:
    """Answers the clients' requests one at a time. `rows` and `held_out` are each client's rows of `examples`."""

    adapted: Adapted
    task: Task
    examples: Encoded
    rows: Mapping[str, torch.Tensor]
    held_out: Mapping[str, torch.Tensor]
    test: Encoded
    settings: Train
    judge_batch: int

    def fit(self, request: Fit, who: ClientInfo, rnd: Round, step: int) -> tuple[Adapter, Mapping[str, float]]:
        """The trained adapter, and its `loss`."""
        seed = derive(rnd.seed, "fit", rnd.index, who.id, step)
        trained = train_one(self.adapted, self.task, self.examples, self.rows[who.id], request, self.settings, seed)
        return trained.adapter, {"loss": trained.loss}

    def fold(self, change: Mapping[str, LowRank]) -> None:
        """Changes the resident base for good."""
        self.adapted.fold(change)

    def score(self, adapter: Adapter, who: ClientInfo) -> Score | None:
        """The adapter on the client's held-out examples, if it has any."""
        rows = self.held_out[who.id]
        return score(self.adapted, self.task, self.examples, rows, adapter, self.judge_batch) if len(rows) else None

    def judge(self, adapter: Adapter) -> Score:
        """The adapter on the global test set."""
        return score(self.adapted, self.task, self.test, torch.arange(len(self.test)), adapter, self.judge_batch)
