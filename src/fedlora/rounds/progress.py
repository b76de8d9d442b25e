"""Who shows a run's progress."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from fedlora.messages import ClientInfo, Round


@runtime_checkable
class Progress(Protocol):
    """Progress callbacks."""

    def notify(self, message: str) -> None:
        """A line that the user should read before the first round."""

    def round_started(self, rnd: Round, chosen: Sequence[ClientInfo]) -> None:
        """The cohort is known."""

    def answered(self, client: ClientInfo, rejected: str | None) -> None:
        """One client's answer came; `rejected` is the reason if it is not used."""

    def round_ended(self, row: Mapping[str, Any]) -> None:
        """The round's row, before it is written."""


class NullProgress:
    """Shows no progress."""

    def notify(self, message: str) -> None:
        """Nothing."""

    def round_started(self, rnd: Round, chosen: Sequence[ClientInfo]) -> None:
        """Nothing."""

    def answered(self, client: ClientInfo, rejected: str | None) -> None:
        """Nothing."""

    def round_ended(self, row: Mapping[str, Any]) -> None:
        """Nothing."""
