"""Training of many clients' adapters in one forward and backward pass of the shared model."""

from collections.abc import Sequence

import torch
from torch.nn import functional

from fedlora.adapter import Adapter, pack
from fedlora.config.sections import Train
from fedlora.messages import Trained
from fedlora.models.adapted import AdaptedModel
from fedlora.models.dropout import ClientDropout, answer_length
from fedlora.randomness import derive, generator
from fedlora.tasks.task import NO_TARGET, Examples, Task, reduced
from fedlora.train.batches import collate_clients
from fedlora.train.job import Job, step_key
from fedlora.train.micro_batches import passes
from fedlora.train.optimizer import (
    MaskedParameter,
    clip_gradients,
    make_optimizer,
    optimizer_step,
    replace_parameters,
    scale_gradients,
)
from fedlora.train.schedule import step_rate


def train_together(
    adapted: AdaptedModel,
    task: Task,
    examples: Examples,
    jobs: Sequence[Job],
    settings: Train,
    max_tokens: int,
    dropout: float | None = None,
) -> list[Trained]:
    """Trains each client according to its request, with a new optimizer, independently of the other clients.

    A step descends the mean loss of the client's batch, over its targets or over its examples (`settings.reduction`).
    All requests have the same `step_key`. One step takes the next batch of every client that still has one; factors,
    heads and optimizer states have a client axis. The base processes the batches in micro-batches of at most
    `max_tokens` (padding included) with batches of similar length; a single batch is split only with `train.accumulate`.
    The order of a client's examples and its dropout depend on its own seeds alone. The last batch of an epoch may be
    smaller. `dropout` replaces all nonzero probabilities of the model and the LoRA layers.
    """
    requests = [job.request for job in jobs]
    assert len({step_key(request) for request in requests}) == 1, "requests of several kinds cannot be trained together"
    train = requests[0].train
    parameters = adapted.load_clients([r.start for r in requests], train, [r.frozen_extra for r in requests])
    keys = [key for key in pack(requests[0].start) if key.rpartition(".")[2] in train]
    named = dict(zip(keys, parameters, strict=True))
    optimizer = make_optimizer(settings, named, requests[0].rates or {})
    masked = [
        MaskedParameter.of(x, key, requests) for key, x in named.items() if any(key in (r.mask or {}) for r in requests)
    ]
    device, lengths = parameters[0].device, examples.lengths()
    queues = [job.batches(lengths, settings) for job in jobs]
    generators = [torch.Generator(device).manual_seed(derive(job.seed, "dropout")) for job in jobs]
    augmenting = [generator(job.seed, "augment") for job in jobs]
    steps = [job.steps(settings) for job in jobs]
    last_epoch = [n - min(n, job.steps_per_epoch(settings)) for n, job in zip(steps, jobs, strict=True)]
    losses, counts = torch.zeros(2, len(jobs), device=device)
    done: dict[int, Adapter] = {}
    active = list(range(len(jobs)))

    def read(place: int, i: int) -> Adapter:
        return requests[i].restore(adapted.read(place, requests[i].start, requests[i].train))

    adapted.model.train()
    with ClientDropout(adapted.packing, dropout) as client_dropout:
        adapted.checkpointing.modes = (client_dropout, adapted.packing)
        for step in range(max(steps)):
            if len(unfinished := [i for i in active if steps[i] > step]) < len(active):
                done |= {i: read(place, i) for place, i in enumerate(active) if steps[i] == step}
                remaining = [active.index(i) for i in unfinished]
                new = dict(adapted.select_clients(remaining))
                replace_parameters(optimizer, new, remaining)
                masked = [fixed.select_clients(new[fixed.parameter], remaining) for fixed in masked]
                active = unfinished
            batches = [next(queues[i]) for i in active]
            total = torch.zeros(1, device=device)
            for part in passes(batches, lengths, max_tokens, adapted.packing.works, settings.accumulate):
                present = [active[place] for place in part.places]
                everyone = len(present) == len(active)
                adapted.client_layout.index = None if everyone else torch.tensor(part.places, device=device)
                rows, real = collate_clients(part.rows)
                draws = [
                    torch.randint(1 << 31, (len(own),), generator=augmenting[i])
                    for i, own in zip(present, part.rows, strict=True)
                ]
                inputs, targets = examples.batch(rows, device, collate_clients(draws)[0])
                sizes = [(int(lengths[own].max()), len(own)) for own in part.rows]
                answers = examples.longest_answers(part.rows)
                client_dropout.next_pass([generators[i] for i in present], sizes, answers)
                if answers and len(present) > 1:
                    filler = answer_length(max(length for length, _ in sizes), targets.shape[1]) - targets.shape[1]
                    targets = functional.pad(targets, (0, filler), value=NO_TARGET)
                own_lengths = lengths[rows].view(real.shape) * real
                with adapted.packing.of(own_lengths, device, task.tokens_read(inputs, targets)):
                    sums, terms = reduced(*task.losses(adapted.model, inputs, targets), settings.reduction)
                real = real.to(device)
                own_loss, own_terms = ((x.view(real.shape) * real).sum(1) for x in (sums, terms))
                before, total = total, own_terms if part.first else total + own_terms
                if not part.first:  # the gradient is that of the mean over the earlier passes
                    scale_gradients(optimizer, part.places[0], before / total)
                objective = (own_loss / total).sum()
                for place, i in zip(part.places, present, strict=True):
                    if requests[i].penalties and part.last:
                        live = adapted.tensors(place, requests[i].start)
                        objective = sum((penalty(live) for penalty in requests[i].penalties), objective)
                objective.backward()  # type: ignore[no-untyped-call]
                counted = torch.tensor([step >= last_epoch[i] for i in present], device=device)
                at = torch.tensor(present, device=device)
                losses[at] += own_loss.detach() * counted
                counts[at] += own_terms * counted
            for place, i in enumerate(active):
                adapted.add_to_gradient(place, requests[i].correction or {}, requests[i].train)
            for fixed in masked:
                fixed.clear_gradient()
            if settings.clip_norm is not None:
                clip_gradients(optimizer, settings.clip_norm)
            optimizer_step(optimizer, [step_rate(settings, step, steps[i]) for i in active])
            optimizer.zero_grad()
            for fixed in masked:
                fixed.restore()
    done |= {i: read(place, i) for place, i in enumerate(active)}
    means = (losses / counts).cpu().tolist()
    return [Trained(done[i], means[i], steps[i]) for i in range(len(jobs))]
