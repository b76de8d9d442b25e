"""Training of one client: its batches, and its result."""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from itertools import count

from torch import Tensor

from fedlora.config.sections import Train
from fedlora.messages import Fit
from fedlora.models.structure import structure
from fedlora.randomness import generator
from fedlora.train.batches import epoch


@dataclass(frozen=True)
class Job:
    """One client's training on the examples `rows` [rows]; `shared_order_seed` is the same for all clients."""

    request: Fit
    rows: Tensor
    seed: int
    shared_order_seed: int

    def epochs(self, settings: Train) -> int:
        """The requested number of epochs, else the run's."""
        return settings.epochs if self.request.epochs is None else self.request.epochs

    def steps_per_epoch(self, settings: Train) -> int:
        """Number of batches in an epoch."""
        return -(-len(self.rows) // settings.batch_size)

    def steps(self, settings: Train) -> int:
        """Number of batches: the requested one, else that of the requested epochs, else the run's."""
        if self.request.epochs is None and (steps := self.request.steps or settings.max_steps):
            return steps
        return self.epochs(settings) * self.steps_per_epoch(settings)

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
    """Properties that requests trained in one step must share: trained factors, structure, rates, modules with frozen
    extras."""
    return (
        request.train,
        structure(request.start),
        frozenset((request.rates or {}).items()),
        frozenset(request.frozen_extra or ()),
    )
