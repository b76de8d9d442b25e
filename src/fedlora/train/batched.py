"""Training of many clients' adapters in one forward and backward pass of the shared model."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedlora.adapter import Adapter, pack
from fedlora.config.sections import Train
from fedlora.messages import Fit
from fedlora.models.adapted import AdaptedModel, form
from fedlora.models.dropout import ClientDropout
from fedlora.randomness import derive, generator
from fedlora.tasks.classification import Encoded, Task
from fedlora.train.batches import concat_factors, epoch


@dataclass(frozen=True)
class Job:
    """One client's training on the examples `rows` [rows]; `seed` is the client's, `shared_order_seed` common to all."""

    request: Fit
    rows: Tensor
    seed: int
    shared_order_seed: int

    def epochs(self, settings: Train) -> int:
        """The requested number of epochs, else the run's."""
        return settings.epochs if self.request.epochs is None else self.request.epochs

    def steps(self, settings: Train) -> int:
        """Number of batches in all epochs."""
        return self.epochs(settings) * -(-len(self.rows) // settings.batch_size)

    def batches(self, lengths: Tensor, settings: Train) -> Iterator[Tensor]:
        """Yields the rows of each batch."""
        order = generator(self.seed, "order")
        for i in range(self.epochs(settings)):
            places = epoch(
                lengths[self.rows],
                settings.batch_size,
                settings.batches == "by-length",
                order,
                generator(self.shared_order_seed, "pace", i),
            )
            yield from (self.rows[place] for place in places)


@dataclass(frozen=True)
class Trained:
    """Result of one training: the adapter, the mean loss over its last epoch, the number of steps."""

    adapter: Adapter
    loss: float
    steps: int


def in_common(request: Fit) -> Hashable:
    """Properties that requests trained in one step must share: trained factors, form, rates, modules with frozen extras."""
    return (
        request.train,
        form(request.start),
        frozenset((request.rates or {}).items()),
        frozenset(request.frozen_extra or ()),
    )


def train_together(
    adapted: AdaptedModel,
    task: Task,
    examples: Encoded,
    jobs: Sequence[Job],
    settings: Train,
    tokens: int,
    dropout: float | None = None,
) -> list[Trained]:
    """Trains each client according to its request, with a fresh optimizer, as if it were alone.

    All requests have the same `in_common`. One step takes the next batch of every client that still has one; factors, heads
    and optimizer states have a client axis. The base processes the batches in micro-batches of at most `tokens` (padding
    included) with batches of similar length; a single batch is never split. The order of a client's examples and its
    dropout depend on its own seeds alone. The last batch of an epoch may be smaller. `dropout` replaces all nonzero
    probabilities of the model and the LoRA layers.
    """
    assert len({in_common(job.request) for job in jobs}) == 1, "requests of several kinds cannot be trained together"
    train = jobs[0].request.train
    parameters = adapted.load([job.request.start for job in jobs], train, [job.request.frozen_extra for job in jobs])
    keys = [key for key in pack(jobs[0].request.start) if _factor(key) in train]
    named = dict(zip(keys, parameters, strict=True))
    optimizer = _optimizer(named, jobs[0].request.rates or {}, settings)
    masked = [_Masked.of(x, key, jobs) for key, x in named.items() if any(key in (job.request.mask or {}) for job in jobs)]
    device, lengths = parameters[0].device, examples.lengths()
    queues = [job.batches(lengths, settings) for job in jobs]
    chances = [torch.Generator(device).manual_seed(derive(job.seed, "dropout")) for job in jobs]
    steps = [job.steps(settings) for job in jobs]
    last_epoch = [n - n // job.epochs(settings) for n, job in zip(steps, jobs, strict=True)]
    losses = torch.zeros(len(jobs), device=device)
    done: dict[int, Adapter] = {}
    live = list(range(len(jobs)))
    adapted.model.train()
    with ClientDropout(adapted.packing, dropout) as chance:
        for step in range(max(steps)):
            if len(going := [i for i in live if steps[i] > step]) < len(live):
                for place, i in enumerate(live):
                    if steps[i] == step:
                        done[i] = _read(adapted, place, jobs[i].request)
                masked = _go_on(optimizer, masked, adapted, [live.index(i) for i in going])
                live = going
            batches = [next(queues[i]) for i in live]
            sizes = [(int(lengths[batch].max()), len(batch)) for batch in batches]
            packed = [(int(lengths[batch].sum()), 1) for batch in batches]
            for places in passes(packed if adapted.packing.works else sizes, tokens):
                now = [live[place] for place in places]
                adapted.present.index = None if len(now) == len(live) else torch.tensor(places, device=device)
                some = [batches[place] for place in places]
                rows, real = concat_factors(some)
                inputs, targets = examples.batch(rows, device)
                chance.next_pass([chances[i] for i in now], [sizes[place] for place in places])
                with adapted.packing.of(lengths[rows].view(real.shape) * real, device):
                    each = task.losses(adapted.model, inputs, targets)
                real = real.to(device)
                each = each.view(real.shape) * real
                objective = (each.sum(1) / real.sum(1)).sum()
                for place, i in zip(places, now, strict=True):
                    if (penalty := jobs[i].request.penalty) is not None:
                        objective = objective + penalty(adapted.tensors(place, jobs[i].request.start))
                objective.backward()  # type: ignore[no-untyped-call]
                counted = torch.tensor([step >= last_epoch[i] for i in now], device=device)
                losses[torch.tensor(now, device=device)] += each.detach().sum(1) * counted
            for part in masked:
                part.clear_gradient()
            if settings.clip_norm is not None:
                _clip(optimizer, settings.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            for part in masked:
                part.put_back()
    done |= {i: _read(adapted, place, jobs[i].request) for place, i in enumerate(live)}
    means = (losses.cpu() / torch.tensor([len(job.rows) for job in jobs])).tolist()
    return [Trained(done[i], means[i], steps[i]) for i in range(len(jobs))]


def passes(sizes: Sequence[tuple[int, int]], tokens: int) -> Iterator[list[int]]:
    """Indices of the batches in each micro-batch, grouped by length; `sizes` are (length of longest example, examples)."""
    some: list[int] = []
    for place in sorted(range(len(sizes)), key=lambda p: sizes[p]):
        wide, run = sizes[place][0], max(sizes[p][1] for p in (*some, place))
        if some and (len(some) + 1) * wide * run > tokens:
            yield sorted(some)
            some = []
        some.append(place)
    yield sorted(some)


def bytes_per_token(adapted: AdaptedModel, task: Task, examples: Encoded, start: Adapter) -> int:
    """Bytes that a training pass stores for its backward pass, per token of the longest example; 1 without examples."""
    if len(examples) == 0:
        return 1
    (parameter, *_) = adapted.load([start], "ba")
    kept: dict[int, int] = {}

    def count(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    longest = examples.lengths().argmax()[None]
    inputs, targets = examples.batch(longest, parameter.device)
    adapted.model.train()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x), ClientDropout() as chance:
        chance.next_pass([torch.Generator(parameter.device).manual_seed(0)], [(int(examples.lengths().max()), 1)])
        task.losses(adapted.model, inputs, targets)
    own = {x.untyped_storage().data_ptr() for x in (*adapted.model.parameters(), *adapted.model.buffers())}
    adapted.load([])
    return max(1, sum(size for at, size in kept.items() if at not in own) // int(examples.lengths().max()))


def _optimizer(named: Mapping[str, nn.Parameter], rates: Mapping[str, float], settings: Train) -> torch.optim.Optimizer:
    """An elementwise optimizer, so that a client axis changes nothing, with one parameter group for each factor."""
    factors: dict[str, list[nn.Parameter]] = {}
    for key, parameter in named.items():
        factors.setdefault(_factor(key), []).append(parameter)
    groups = [{"params": own, "lr": settings.lr * rates.get(factor, 1.0)} for factor, own in factors.items()]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)


@dataclass(frozen=True)
class _Masked:
    """A parameter, the mask of its fixed entries, and their values, all [clients, *shape]."""

    parameter: nn.Parameter
    fixed: Tensor
    before: Tensor

    @staticmethod
    def of(parameter: nn.Parameter, key: str, jobs: Sequence[Job]) -> "_Masked":
        fixed = torch.zeros_like(parameter, dtype=torch.bool)
        for own, job in zip(fixed, jobs, strict=True):
            if job.request.mask is not None and key in job.request.mask:
                shape = pack(job.request.start)[key].shape
                moves = job.request.mask[key].to(fixed.device).expand(shape)
                own[tuple(slice(n) for n in shape)] = ~moves
        return _Masked(parameter, fixed, parameter.detach().clone())

    def clear_gradient(self) -> None:
        if self.parameter.grad is not None:
            self.parameter.grad.masked_fill_(self.fixed, 0)

    def put_back(self) -> None:
        """Restores the fixed entries, which weight decay has changed."""
        self.parameter.data.copy_(self.before.where(self.fixed, self.parameter.data))


def _go_on(
    optimizer: torch.optim.Optimizer, masked: Sequence[_Masked], adapted: AdaptedModel, clients: list[int]
) -> list[_Masked]:
    """Drops all loaded clients but these, also from the optimizer's state and the masks; returns the masks."""
    index = torch.tensor(clients)
    new = dict(adapted.keep(clients))
    for group in optimizer.param_groups:
        for i, old in enumerate(group["params"]):
            group["params"][i] = new[old]
            state = optimizer.state.pop(old, {})
            optimizer.state[new[old]] = {
                key: x[index.to(x.device)] if isinstance(x, Tensor) and x.shape == old.shape else x
                for key, x in state.items()
            }
    return [_Masked(new[m.parameter], *(x[index.to(x.device)] for x in (m.fixed, m.before))) for m in masked]


def _read(adapted: AdaptedModel, place: int, request: Fit) -> Adapter:
    return request.restore(adapted.read(place, request.start, request.train))


def _factor(key: str) -> str:
    return key.rpartition(".")[2]


def _clip(optimizer: torch.optim.Optimizer, norm: float) -> None:
    """Clips each client's gradient to the norm."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)  # [clients]
    scale = (norm / (norms + 1e-6)).clamp(max=1)
    for gradient in gradients:
        gradient.mul_(scale.view(-1, *[1] * (gradient.ndim - 1)))
