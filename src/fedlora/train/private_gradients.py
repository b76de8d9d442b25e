"""The gradients of a step of DP-SGD: clipped for each example, summed, and noised."""

import math
import secrets
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor, nn

from fedlora.adapter import pack
from fedlora.models.example_gradients import ExampleGradient
from fedlora.random_source import RandomSource, SecretSource, SeededSource
from fedlora.randomness import derive
from fedlora.tasks.task import reduced
from fedlora.train.job import Job
from fedlora.train.optimizer import MaskedParameter
from fedlora.train.per_example import add_clipped, example_passes
from fedlora.train.record_privacy import RecordPrivacy
from fedlora.train.step_gradients import Training, with_answer_length


class PrivateGradients:
    """(sum of clipped gradients + noise) / expected batch, of a sample that has each of a client's examples with its rate.

    The clip is of all trained entries of an example together; the loss of an example is the mean over its targets. Samples,
    noise and dropout of a client depend on its own seeds alone; dropout and augmentation of an example also on its place
    among the client's rows, but not on the sample. With randomness from the operating system, all of them are fresh in each
    step. Penalties are added to the noised gradient: they read no examples. Losses are not computed (NaN): they would be
    released without noise.

    Source: Abadi et al. 2016, arXiv:1607.00133.
    """

    def __init__(self, training: Training) -> None:
        self._training, self._jobs = training, training.jobs
        self._lengths = training.examples.lengths()
        self._sampling = [_source(job, "sample", torch.device("cpu")) for job in training.jobs]
        self._noise = [_source(job, "noise", training.device) for job in training.jobs]

    def add(
        self,
        step: int,
        active: Sequence[int],
        parameters: Mapping[str, nn.Parameter],
        masked: Sequence[MaskedParameter],
    ) -> None:
        """See `StepGradients`."""
        trained = {key: x for key, x in parameters.items() if x.requires_grad}
        for x in trained.values():
            x.grad = torch.zeros_like(x)
        self._add_sums(step, active, trained, {id(one.parameter): one.fixed for one in masked})
        for place, i in enumerate(active):
            self._add_noise(place, i, trained)
        penalties = [
            penalty(self._training.adapted.tensors(place, request.start))
            for place, request in enumerate(self._jobs[i].request for i in active)
            for penalty in request.penalties
        ]
        if penalties:
            torch.stack(penalties).sum().backward()  # type: ignore[no-untyped-call]

    def losses(self) -> list[float]:
        """NaN for each client."""
        return [math.nan] * len(self._jobs)

    def _add_sums(
        self, step: int, active: Sequence[int], trained: Mapping[str, nn.Parameter], fixed: Mapping[int, Tensor]
    ) -> None:
        """Adds the clipped gradients of the step's samples to the gradients of the clients."""
        training = self._training
        samples = [self._sample(i) for i in active]
        if not sum(map(len, samples)):
            return
        rows = torch.cat([self._jobs[i].rows[own] for i, own in zip(active, samples, strict=True)])
        places = torch.cat([torch.full_like(own, place) for place, own in enumerate(samples)])
        drawn = [(self._jobs[i], n) for i, own in zip(active, samples, strict=True) for n in own.tolist()]
        draws = torch.tensor([_seed(job, "augment", step, n) % (1 << 31) for job, n in drawn])
        seeds = [_seed(job, "dropout", step, n) for job, n in drawn]
        clips = torch.tensor([_privacy(self._jobs[i]).clip for i in active], device=training.device)
        sums = {key: x.grad for key, x in trained.items() if x.grad is not None}
        for group in self._passes(self._lengths[rows].tolist(), trained, fixed):
            at = torch.tensor(group)
            each = (rows[at], places[at], draws[at], [seeds[n] for n in group], trained, fixed)
            add_clipped(sums, self._each_gradient(*each), places[at].to(training.device), clips)

    def _passes(
        self, lengths: Sequence[int], trained: Mapping[str, nn.Parameter], fixed: Mapping[int, Tensor]
    ) -> list[list[int]]:
        """See `example_passes`. Beside the activations, a pass keeps a copy and its gradient for each example, or the
        gradients of a matrix's output for each token.

        A model that is trained in its places has one example in a pass, whose gradients are those of the parameters.
        """
        adapted, max_tokens = self._training.adapted, self._training.max_tokens
        if adapted.whole:
            return [[i] for i in range(len(lengths))]
        memory = self._training.settings.activation_memory_mb * 1_000_000
        matrices = {id(x) for x in adapted.matrices()} - fixed.keys()
        of_token = sum(x.shape[1] * x.itemsize for x in trained.values() if id(x) in matrices)
        of_example = sum(2 * x[0].nbytes for x in trained.values() if id(x) not in matrices)
        fewer_tokens = max(1, int(max_tokens / (1 + max_tokens * of_token / memory)))
        return example_passes(lengths, fewer_tokens, memory // max(1, of_example) or 1)

    def _each_gradient(
        self,
        rows: Int[Tensor, " rows"],
        places: Int[Tensor, " rows"],
        draws: Int[Tensor, " rows"],
        seeds: Sequence[int],
        trained: Mapping[str, nn.Parameter],
        fixed: Mapping[int, Tensor],
    ) -> dict[str, ExampleGradient]:
        """The gradient of each row's loss, without masked entries, from one pass."""
        training = self._training
        adapted, task, examples, device = training.adapted, training.task, training.examples, training.device
        places, lengths = places.to(device), self._lengths[rows]
        inputs, targets = examples.batch(rows, device, draws)
        sizes = [(length, 1) for length in lengths.tolist()]
        answers = examples.longest_answers(list(rows[:, None]))
        training.dropout.next_pass([torch.Generator(device).manual_seed(seed) for seed in seeds], sizes, answers)
        targets = with_answer_length(targets, sizes, answers)
        with adapted.client_layout.each_example(places, fixed) as gradients:
            with adapted.packing.of(lengths[:, None], device, task.tokens_read(inputs, targets)):
                losses, _ = reduced(*task.losses(adapted.model, inputs, targets), "example")
            losses.sum().backward()  # type: ignore[no-untyped-call]
        found = {key: own for key, x in trained.items() if (own := gradients.of(x)) is not None}
        for key, own in found.items():
            if isinstance(own, Tensor) and id(trained[key]) in fixed:
                own.masked_fill_(fixed[id(trained[key])][places], 0)
        return found

    def _sample(self, client: int) -> Int[Tensor, " sampled"]:
        """The places of a step's sample among the client's rows; there may be none."""
        job = self._jobs[client]
        return (self._sampling[client].uniform(len(job.rows)) < _privacy(job).rate).nonzero()[:, 0]

    def _add_noise(self, place: int, client: int, trained: Mapping[str, nn.Parameter]) -> None:
        """Adds a client's noise to its sums, and divides them by its expected batch; entries of padding stay zero."""
        job = self._jobs[client]
        privacy, shapes = _privacy(job), {key: x.shape for key, x in pack(job.request.start).items()}
        for key, x in trained.items():
            assert x.grad is not None
            own = x.grad[place][tuple(slice(size) for size in shapes[key])]
            if privacy.noise_multiplier:
                noise = self._noise[client].normal(own.shape)
                own.add_(noise.to(own), alpha=privacy.noise_multiplier * privacy.clip)
            own.div_(privacy.rate * len(job.rows))


def _privacy(job: Job) -> RecordPrivacy:
    assert job.privacy is not None
    return job.privacy


def _source(job: Job, purpose: str, device: torch.device) -> RandomSource:
    return SecretSource() if job.entropy == "os" else SeededSource(derive(job.seed, purpose), device)


def _seed(job: Job, purpose: str, step: int, place: int) -> int:
    """The seed of an example in a step, which depends on its place among the rows, or is secret."""
    return secrets.randbits(63) if job.entropy == "os" else derive(job.seed, purpose, step, place)
