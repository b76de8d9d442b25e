"""The gradients of one step of many clients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.config.sections import Train
from fedlora.models.adapted import AdaptedModel
from fedlora.models.dropout import ClientDropout, answer_length
from fedlora.randomness import derive, generator
from fedlora.tasks.task import NO_TARGET, Examples, Task, reduced
from fedlora.train.batches import collate_clients
from fedlora.train.job import Job
from fedlora.train.micro_batches import passes
from fedlora.train.optimizer import MaskedParameter, scale_gradients


@runtime_checkable
class StepGradients(Protocol):
    """Computes the gradients of the loaded clients, `active` in this order, in each step."""

    def add(
        self,
        step: int,
        active: Sequence[int],
        parameters: Mapping[str, nn.Parameter],
        masked: Sequence[MaskedParameter],
    ) -> None:
        """Sets the gradients of the parameters that require one, which are named as by `pack`, except at `masked` entries,
        whose gradients are not used."""

    def losses(self) -> list[float]:
        """Each client's mean loss over its last epoch."""


@dataclass(frozen=True)
class Training:
    """What gradients are computed from: the jobs of clients that are loaded together, and the `dropout` of their passes.

    A pass has at most `max_tokens` tokens, padding included, as far as a kind of gradients can divide a step.
    """

    adapted: AdaptedModel
    task: Task
    examples: Examples
    jobs: Sequence[Job]
    settings: Train
    max_tokens: int
    dropout: ClientDropout
    device: torch.device


class MeanGradients:
    """The gradients of the mean losses of batches in random order; see `train_together`."""

    def __init__(self, training: Training) -> None:
        self._training = training
        jobs, settings, device = training.jobs, training.settings, training.device
        self._lengths = training.examples.lengths()
        self._queues = [job.batches(self._lengths, settings) for job in jobs]
        self._generators = [torch.Generator(device).manual_seed(derive(job.seed, "dropout")) for job in jobs]
        self._augmenting = [generator(job.seed, "augment") for job in jobs]
        steps = [job.steps(settings) for job in jobs]
        self._last_epoch = [n - min(n, job.steps_per_epoch(settings)) for n, job in zip(steps, jobs, strict=True)]
        self._losses, self._counts = torch.zeros(2, len(jobs), device=device)

    def add(
        self,
        step: int,
        active: Sequence[int],
        parameters: Mapping[str, nn.Parameter],
        masked: Sequence[MaskedParameter],
    ) -> None:
        """See `StepGradients`; penalties are a part of the loss."""
        training, lengths = self._training, self._lengths
        adapted, task, examples, device = training.adapted, training.task, training.examples, training.device
        settings, requests = training.settings, [job.request for job in training.jobs]
        batches = [next(self._queues[i]) for i in active]
        total = torch.zeros(1, device=device)
        for part in passes(batches, lengths, training.max_tokens, adapted.packing.works, settings.accumulate):
            present = [active[place] for place in part.places]
            everyone = len(present) == len(active)
            adapted.client_layout.index = None if everyone else torch.tensor(part.places, device=device)
            rows, real = collate_clients(part.rows)
            draws = [
                torch.randint(1 << 31, (len(own),), generator=self._augmenting[i])
                for i, own in zip(present, part.rows, strict=True)
            ]
            inputs, targets = examples.batch(rows, device, collate_clients(draws)[0])
            sizes = [(int(lengths[own].max()), len(own)) for own in part.rows]
            answers = examples.longest_answers(part.rows)
            training.dropout.next_pass([self._generators[i] for i in present], sizes, answers)
            targets = with_answer_length(targets, sizes, answers)
            own_lengths = lengths[rows].view(real.shape) * real
            with adapted.packing.of(own_lengths, device, task.tokens_read(inputs, targets)):
                sums, terms = reduced(*task.losses(adapted.model, inputs, targets), settings.reduction)
            real = real.to(device)
            own_loss, own_terms = ((x.view(real.shape) * real).sum(1) for x in (sums, terms))
            before, total = total, own_terms if part.first else total + own_terms
            if not part.first:  # the gradient is that of the mean over the earlier passes
                scale_gradients(parameters.values(), part.places[0], before / total)
            objective = (own_loss / total).sum()
            for place, i in zip(part.places, present, strict=True):
                if requests[i].penalties and part.last:
                    live = adapted.tensors(place, requests[i].start)
                    objective = sum((penalty(live) for penalty in requests[i].penalties), objective)
            objective.backward()  # type: ignore[no-untyped-call]
            counted = torch.tensor([step >= self._last_epoch[i] for i in present], device=device)
            at = torch.tensor(present, device=device)
            self._losses[at] += own_loss.detach() * counted
            self._counts[at] += own_terms * counted

    def losses(self) -> list[float]:
        """See `StepGradients`."""
        means: list[float] = (self._losses / self._counts).cpu().tolist()
        return means


def with_answer_length(targets: Tensor, sizes: Sequence[tuple[int, int]], answers: Sequence[int]) -> Tensor:
    """The targets, padded as `answer_length` needs if several clients share the pass of an encoder-decoder."""
    if not answers or len(sizes) < 2:
        return targets
    filler = answer_length(max(length for length, _ in sizes), targets.shape[1]) - targets.shape[1]
    return functional.pad(targets, (0, filler), value=NO_TARGET)
