"""Rows of rounds that took no time, for tests that make rows or compare them."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from fedlora.rounds.row import RoundRow, Seconds

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def round_row(number: int, **given: Any) -> RoundRow:
    """A row with these values, and the defaults of all others."""
    return RoundRow(**{"round": number, "started": NOW, "ended": NOW, **given})


def untimed(row: RoundRow) -> RoundRow:
    """The row without what differs between a run and its twin."""
    return replace(row, started=NOW, ended=NOW, seconds=Seconds())
