"""Training of one client: its batches, and its result."""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from torch import Tensor

from fedlora.adapter import Adapter
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


def step_key(request: Fit) -> Hashable:
    """Properties that requests trained in one step must share: trained factors, structure, rates, modules with frozen
    extras."""
    return (
        request.train,
        structure(request.start),
        frozenset((request.rates or {}).items()),
        frozenset(request.frozen_extra or ()),
    )
