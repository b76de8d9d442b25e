"""Training of one client: its batches, and its result."""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Literal

from torch import Tensor

from fedlora.config.sections import Train
from fedlora.messages import Fit
from fedlora.models.structure import structure
from fedlora.randomness import generator
from fedlora.train.batches import epoch
from fedlora.train.record_privacy import RecordPrivacy
from fedlora.train.steps import number_of_steps, steps_per_epoch

Entropy = Literal["seed", "os"]
"""Where noise, samples, dropout and augmentation of private training come from: seeds, or the operating system, which keeps
them secret."""


@dataclass(frozen=True)
class Job:
    """One client's training on the examples `rows` [rows]; `shared_order_seed` is the same for all clients.

    With `privacy`, it is DP-SGD on random samples of the rows, with randomness from `entropy`.
    """

    request: Fit
    rows: Tensor
    seed: int
    shared_order_seed: int
    privacy: RecordPrivacy | None = None
    entropy: Entropy = "seed"

    def steps_per_epoch(self, settings: Train) -> int:
        """Number of batches in an epoch."""
        return steps_per_epoch(settings, len(self.rows))

    def steps(self, settings: Train) -> int:
        """See `number_of_steps`."""
        return number_of_steps(self.request, settings, len(self.rows))

    def batches(self, lengths: Tensor, settings: Train) -> Iterator[Tensor]:
        """Yields the rows of each batch, without end."""
        order = generator(self.seed, "order")
        for i in count():
            places = epoch(
                lengths[self.rows],
                settings.batch_size,
                settings.batches == "by-length",
                order,
                generator(self.shared_order_seed, "pace", i),
            )
            yield from (self.rows[place] for place in places)


def step_key(request: Fit) -> Hashable:
    """Properties that requests trained in one step must share: trained factors and their turns, structure, rates, modules
    with frozen extras, filter."""
    return (
        request.train,
        request.alternate,
        request.gradient_filter,
        structure(request.start),
        frozenset((request.rates or {}).items()),
        frozenset(request.frozen_extra or ()),
    )
