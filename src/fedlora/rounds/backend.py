"""Interface through which the round loop reaches the clients."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

from fedlora.adapter import Tensors
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Reply, Round, Statistics
from fedlora.rounds.validator import Failed

Scores = Iterator[tuple[ClientInfo, Statistics | None]]
"""Each client's statistics on its held-out examples; None for a client without any."""


@runtime_checkable
class Backend(Protocol):
    """Access to the clients, in this process or on other machines."""

    def clients(self) -> Sequence[ClientInfo]:
        """All registered clients."""

    def held(self) -> Mapping[str, Sequence[int]]:
        """Indices of the rounds whose base updates a client has applied, for each client that has reported them."""

    def merge_into_base(self, change: Mapping[str, LowRank]) -> None:
        """Merges a base update into the local base, which later training and evaluation in this process use."""

    def train_clients(
        self, rnd: Round, sent: Mapping[ClientInfo, Tensors], pending: Mapping[ClientInfo, Tensors]
    ) -> Iterator[Reply | Failed]:
        """Trains the clients on their downloads; yields replies and failures in the order of `sent`.

        The scores of an earlier `evaluate` may not have been collected yet: clients evaluate first. `pending` holds the
        base updates (see `base_updates.pending_tensors`) that a client must apply first.
        """

    def evaluate(self, rnd: Round, sent: Mapping[ClientInfo, Tensors], pending: Mapping[ClientInfo, Tensors]) -> Scores:
        """Evaluates the adapters that clients would use in round `rnd`."""
