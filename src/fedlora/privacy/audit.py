"""Empirical lower bounds on epsilon by an audit in one run (Steinke et al. 2023, arXiv:2305.08846).

A number of canaries are each included by a fair coin; after the mechanism has run, an attacker guesses from scores which
ones were. A mechanism with a small epsilon does not allow many correct guesses.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.special import bdtr, bdtrc
from torch import Tensor

from fedlora.adapter import Tensors
from fedlora.randomness import generator

CONFIDENCE = 0.95
_LARGEST = 100.0

Release = Callable[[Iterable[Tensors], int], Tensors]
"""A mechanism: the released noisy sum of the terms, of any norm, of the units that take part; the integer is a seed."""


@dataclass(frozen=True)
class Audit:
    """Result of an audit: of the `canaries`, `guesses` were guessed to be included or not, `correct` of them rightly."""

    canaries: int
    guesses: int
    correct: int
    delta: float

    @property
    def bound(self) -> float:
        """The lower bound on epsilon, which holds with 95 % confidence."""
        return lower_bound(self.canaries, self.guesses, self.correct, self.delta)

    @property
    def ceiling(self) -> float:
        """The bound if all guesses were correct: an audit of this size cannot find more."""
        return lower_bound(self.canaries, self.guesses, self.guesses, self.delta)

    def text(self) -> str:
        """The result in words."""
        return (
            f"empirical lower bound on epsilon {self.bound:.2f} ({CONFIDENCE:.0%} confidence; {self.correct} of "
            f"{self.guesses} guesses about {self.canaries} canaries correct; at most {self.ceiling:.2f} can be found)"
        )


def lower_bound(canaries: int, guesses: int, correct: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """The smallest epsilon that is consistent with this many correct guesses; 0 if no privacy loss is shown.

    At a smaller epsilon, so many correct guesses have a probability of at most 1 - `confidence`.
    """

    def consistent(epsilon: float) -> bool:
        return _tail(canaries, guesses, correct, epsilon, delta) >= 1 - confidence

    if consistent(0.0):
        return 0.0
    low, high = 0.0, _LARGEST
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if consistent(middle) else (middle, high)
    return low


def _tail(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """An upper bound on the probability of at least `correct` correct guesses if the mechanism is (epsilon, delta)-private.

    Source: theorem 5.2 of the paper.
    """
    chance = 1 / (1 + math.exp(-epsilon))
    if not correct:
        return 1.0
    below = bdtr(np.arange(correct, dtype=float), guesses, chance)  # P[at most 0, ..., correct - 1 are correct]
    between = below[-1] - np.append(below[-2::-1], 0.0)  # P[from correct - i to correct - 1], i = 1, ..., correct
    excess = float((between / np.arange(1, correct + 1)).max())
    return float(bdtrc(correct - 1.0, guesses, chance)) + 2 * canaries * delta * excess


def judge(scores: Float[Tensor, " canaries"], included: Bool[Tensor, " canaries"], each: int, delta: float) -> Audit:
    """The audit in which the `each` highest scores are guessed to be included, and the `each` lowest not to be.

    Raises:
        ValueError: there are fewer than two guesses, or more than canaries.
    """
    count = len(scores)
    if not 1 <= each <= count // 2:
        raise ValueError(f"expected 1 to {count // 2} guesses on each side for {count} canaries, found {each}")
    order = scores.nan_to_num(nan=0.0).argsort(stable=True)
    correct = int(included[order[-each:]].sum()) + int((~included[order[:each]]).sum())
    return Audit(count, 2 * each, correct, delta)


def coins(count: int, seed: int) -> Bool[Tensor, " canaries"]:
    """Whether each canary is included: fair coins."""
    return torch.randint(2, (count,), generator=generator(seed, "audit", "coins")).bool()


def audit_mechanism(
    release: Release,
    shapes: Mapping[str, tuple[int, ...]],
    canaries: int,
    each: int,
    norm: float,
    delta: float,
    seed: int,
    releases: int = 1,
) -> Audit:
    """The audit of a mechanism alone, without training.

    A canary is a term along one coordinate of the tensors with these shapes, of this norm, which should be above the clip
    so that a mechanism that does not clip is noticed. Different canaries have different coordinates; a canary's score is
    the coordinate in the sum of all releases. To audit a group of tensors, leave the others out of `shapes`.

    Raises:
        ValueError: there are fewer coordinates than canaries.
    """
    total = sum(math.prod(shape) for shape in shapes.values())
    if canaries > total:
        raise ValueError(f"expected at most {total} canaries, one for each coordinate, found {canaries}")
    rng, included = generator(seed, "audit", "coordinates"), coins(canaries, seed)
    places = torch.randperm(total, generator=rng)[:canaries]
    signs = 1.0 - 2.0 * torch.randint(2, (canaries,), generator=rng)

    def terms() -> Iterator[Tensors]:
        for place, sign in zip(places[included].tolist(), signs[included].tolist(), strict=True):
            flat = torch.zeros(total)
            flat[place] = sign * norm
            yield _split(flat, shapes)

    scores = torch.zeros(canaries)
    for i in range(releases):
        released = release(terms(), seed + i)
        scores += signs * torch.cat([released[name].flatten() for name in shapes])[places]
    return judge(scores, included, each, delta)


def _split(flat: Float[Tensor, " entries"], shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    parts = torch.split(flat, [math.prod(shape) for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
