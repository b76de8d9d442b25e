"""Differential privacy of clients: cohorts drawn client by client, and noise on the sum of their clipped changes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.adapter import Tensors
from fedlora.messages import ClientInfo, Mean, Round
from fedlora.random_source import RandomSource, SecretSource, SeededSource
from fedlora.randomness import derive

_COUNT_NOISE = 0.05  # of the expected cohort: the noise on the number of changes within the clip


@dataclass(frozen=True)
class Frame:
    """What all uploads of a round are relative to: the expanded upload without training, the same for all clients.

    The tensors in `constant` do not depend on the values of an upload, such as numbers of owners.
    """

    template: Tensors
    constant: frozenset[str] = frozenset()


class ClippedSum:
    """Sum, in fp64, of changes from a frame, each scaled down to an L2 norm of at most `clip` over all tensors together.

    `majority` is the sum over the changes of 1/2 if the change was within the clip, else -1/2.
    """

    def __init__(self, frame: Frame, clip: float) -> None:
        self.clip, self.majority = clip, 0.0
        self._template = frame.template
        self._sums = {
            name: torch.zeros_like(x, dtype=torch.float64)
            for name, x in frame.template.items()
            if name not in frame.constant
        }

    def add(self, expanded: Tensors) -> None:
        """Adds the change of one expanded upload."""
        changes = {name: expanded[name].double() - self._template[name].double() for name in self._sums}
        norm = math.sqrt(sum(float(torch.linalg.vector_norm(x)) ** 2 for x in changes.values()))
        self.majority += 0.5 if norm <= self.clip else -0.5
        for name, x in changes.items():
            self._sums[name].add_(x, alpha=min(1.0, self.clip / norm) if norm else 1.0)

    def mean(self, noise: Callable[[Tensor], Tensor], expected_cohort: float) -> Mean:
        """The template plus the sum and its noise, divided by the expected cohort.

        `noise` returns the noise on a tensor. If clients add shares of it to what they send, it is only what these lack.
        """
        moved = {
            name: (self._template[name] + (x + noise(x)) / expected_cohort).to(self._template[name].dtype)
            for name, x in self._sums.items()
        }
        return Mean.of([(1.0, {name: moved.get(name, x) for name, x in self._template.items()})])


@dataclass(frozen=True)
class NoisedMean:
    """What a round releases. `share` is the noised fraction of the changes that were within the clip, and `next_clip` the
    clip that follows from it; both None if the clip is fixed."""

    mean: Mean
    clip: float
    share: float | None = None
    next_clip: float | None = None


@dataclass(frozen=True)
class ClientPrivacy:
    """Client-level differential privacy of a run.

    In each round, each client takes part with probability `rate`, independently of the others. Noise with the standard
    deviation `noise_multiplier` * `clip` is added to the sum of the clipped changes, which is divided by `expected_cohort`.
    That number is fixed, so an upload that is late or rejected counts as no change, and an empty cohort releases noise.

    Of more than `largest` drawn clients, `largest` take part, chosen at random. The account then depends on the number of
    `clients`: more of them are not drawn.

    With a `quantile`, the clip approaches that quantile of the norms at `quantile_rate`. A part of the budget pays for the
    noised number of changes within the clip: the noise on the sum is larger, so that both cost what `noise_multiplier`
    says.

    `secret` random numbers come from the operating system, for deployments; otherwise they follow from the run's seed, with
    which the noise can be removed. `epsilon` returns the epsilon after a number of rounds.

    Source: McMahan et al. 2018, arXiv:1710.06963; for the quantile Andrew et al. 2021, arXiv:1905.03871.
    """

    clip: float
    noise_multiplier: float
    delta: float
    rate: float
    expected_cohort: float
    epsilon: Callable[[int], float]
    quantile: float | None = None
    quantile_rate: float = 0.2
    secret: bool = False
    largest: int | None = None
    clients: int | None = None

    def __post_init__(self) -> None:
        """Checks that the cohort is large enough for the quantile.

        Raises:
            ValueError: it is not.
        """
        least = self.noise_multiplier / (2 * _COUNT_NOISE)
        if self.quantile is not None and self.expected_cohort <= least:
            raise ValueError(
                f"privacy.clip_quantile needs an expected cohort above {least:.4g} clients with the noise multiplier "
                f"{self.noise_multiplier:.4g}, found {self.expected_cohort:.4g}; raise sampling.fraction, or remove it"
            )

    @property
    def sum_noise(self) -> float:
        """The noise multiplier of the sum."""
        z, count_noise = self.noise_multiplier, _COUNT_NOISE * self.expected_cohort
        return z if self.quantile is None or not z else (z**-2 - (2 * count_noise) ** -2) ** -0.5

    def choose(self, clients: Sequence[ClientInfo], rnd: Round) -> list[ClientInfo]:
        """The cohort of a round, in the order of the clients' ids; it may be empty."""
        ordered = sorted(clients, key=lambda client: client.id)[: None if self.largest is None else self.clients]
        drawn = [one for one in ordered if self._uniform("private cohort", rnd, one) < self.rate]
        if self.largest is None or len(drawn) <= self.largest:
            return drawn
        places = {one.id: self._uniform("truncated cohort", rnd, one) for one in drawn}
        kept = sorted(places, key=places.__getitem__)[: self.largest]
        return [one for one in drawn if one.id in kept]

    def release(self, clipped: ClippedSum, rnd: Round) -> NoisedMean:
        """The noised mean of a round, and the next round's clip."""
        random, clip, noisy = self._random("privacy noise", rnd), clipped.clip, self.noise_multiplier > 0

        def noise(x: Tensor) -> Tensor:
            return self.sum_noise * clip * random.normal(x.shape).to(x) if noisy else torch.zeros_like(x)

        mean = clipped.mean(noise, self.expected_cohort)
        if self.quantile is None:
            return NoisedMean(mean, clip)
        count_noise = _COUNT_NOISE * self.expected_cohort * float(random.normal(torch.Size([1]))) if noisy else 0.0
        share = (clipped.majority + count_noise) / self.expected_cohort + 0.5
        return NoisedMean(mean, clip, share, clip * math.exp(-self.quantile_rate * (share - self.quantile)))

    def _uniform(self, purpose: str, rnd: Round, client: ClientInfo) -> float:
        return float(self._random(purpose, rnd, client.id).uniform(1))

    def _random(self, purpose: str, rnd: Round, client: str = "") -> RandomSource:
        if self.secret:
            return SecretSource()
        return SeededSource(derive(rnd.seed, purpose, rnd.index, client), torch.device("cpu"))
