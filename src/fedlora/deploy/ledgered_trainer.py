"""Training on a node under privacy for records: every step is on the ledger before it is taken."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from fedlora.adapter import Adapter
from fedlora.deploy.privacy_ledger import Budget, BudgetSpent, LedgerDamaged, PrivacyLedger, Release
from fedlora.deploy.reasons import NodeFailure, Reason
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, FitRequest, Gradient, LabelledFeatures, Round, Statistics, Trained
from fedlora.train.record_privacy import RecordPrivacy


@runtime_checkable
class PrivateTrainer(Protocol):
    """A trainer of which each step is a Gaussian release."""

    @property
    def clients_per_step(self) -> int:
        """Preferred number of clients trained at once."""

    def fit(self, asked: Sequence[FitRequest], rnd: Round) -> Sequence[Trained]:
        """As `Trainer.fit`."""

    def steps(self, asked: FitRequest) -> int:
        """The number of steps of the request."""

    def merge_into_base(self, change: Mapping[str, LowRank]) -> None:
        """As `Trainer.merge_into_base`."""


@dataclass(frozen=True)
class LedgeredTrainer:
    """A trainer that keeps within the budgets, and gives nothing else that is derived from the examples."""

    trainer: PrivateTrainer
    ledger: PrivacyLedger
    budgets: Sequence[Budget]
    run: str
    noise: Mapping[str, RecordPrivacy]
    notify: Callable[[str], None]

    @property
    def clients_per_step(self) -> int:
        """Preferred number of clients trained at once."""
        return self.trainer.clients_per_step

    def fit(self, asked: Sequence[FitRequest], rnd: Round) -> Sequence[Trained]:
        """The answers in the order of `asked`. If the training fails, its steps count as taken.

        Raises:
            NodeFailure: a budget does not suffice, or the ledger cannot be used; nothing was trained.
        """
        steps = [self.trainer.steps(one) for one in asked]
        with ledger_errors(self.notify):
            self._require_promised(asked, steps)
            releases = [self._release(one.client, count) for one, count in zip(asked, steps, strict=True)]
            places = self.ledger.reserve(releases, self.budgets)
        found = self.trainer.fit(asked, rnd)
        with ledger_errors(self.notify):
            self.ledger.settle(places, [trained.steps for trained in found])
        return found

    def gradient(self, client: ClientInfo, request: Gradient) -> Adapter:
        """Refused: a gradient without noise."""
        raise self._refused(client, "a gradient")

    def features(self, client: ClientInfo) -> LabelledFeatures:
        """Refused: features are of single examples."""
        raise self._refused(client, "features of its examples")

    def merge_into_base(self, change: Mapping[str, LowRank]) -> None:
        """Merges a base update into the frozen base permanently."""
        self.trainer.merge_into_base(change)

    def scores(self, asked: Sequence[tuple[ClientInfo, Adapter]]) -> Sequence[Statistics | None]:
        """Refused: scores depend on the examples."""
        raise self._refused(asked[0][0], "scores")

    def _release(self, client: ClientInfo, count: int) -> Release:
        noise = self.noise[client.id]
        return Release(
            run=self.run,
            client=client.id,
            unit="record",
            noise_multiplier=noise.noise_multiplier,
            rate=noise.rate,
            count=count,
        )

    def _require_promised(self, asked: Sequence[FitRequest], steps: Sequence[int]) -> None:
        """Checks that each client stays within the number of steps from which its noise was computed."""
        taken = [r for r in self.ledger.releases() if r.run == self.run and r.unit == "record"]
        for one, count in zip(asked, steps, strict=True):
            before, most = sum(r.count for r in taken if r.client == one.client.id), self.noise[one.client.id].steps
            if before + count > most:
                raise BudgetSpent(
                    f"client {one.client.id} has taken {before} of {most} steps of this run, asked for {count}"
                )

    def _refused(self, client: ClientInfo, what: str) -> NodeFailure:
        self.notify(f"client {client.id}: the server asked for {what}; refused, as the run has privacy.unit = 'record'")
        return NodeFailure(Reason.NOT_PRIVATE)


@contextmanager
def ledger_errors(notify: Callable[[str], None]) -> Iterator[None]:
    """Converts errors of the ledger to their reason codes; `notify` receives their texts."""
    try:
        yield
    except BudgetSpent as error:
        notify(f"{Reason.BUDGET.value}: {error}")
        raise NodeFailure(Reason.BUDGET) from None
    except LedgerDamaged as error:
        notify(f"{Reason.LEDGER.value}: {error}")
        raise NodeFailure(Reason.LEDGER) from None
