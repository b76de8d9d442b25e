"""Callbacks for the progress of a run."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from fedlora.messages import ClientInfo, Round
from fedlora.rounds.row import RoundRow


@runtime_checkable
class Progress(Protocol):
    """Progress callbacks."""

    def notify(self, message: str) -> None:
        """Called with a message for the user, before the first round or after the last."""

    def round_started(self, rnd: Round, chosen: Sequence[ClientInfo]) -> None:
        """Called when the cohort has been chosen."""

    def answered(self, client: ClientInfo, rejected: str | None) -> None:
        """Called when a client's reply has arrived; `rejected` is the reason if it was rejected."""

    def round_ended(self, row: RoundRow) -> None:
        """Called with the round's row, before it is written."""


class NullProgress:
    """Ignores all progress."""

    def notify(self, message: str) -> None:
        """Does nothing."""

    def round_started(self, rnd: Round, chosen: Sequence[ClientInfo]) -> None:
        """Does nothing."""

    def answered(self, client: ClientInfo, rejected: str | None) -> None:
        """Does nothing."""

    def round_ended(self, row: RoundRow) -> None:
        """Does nothing."""
