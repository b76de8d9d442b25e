"""Statistics of a round in progress."""

from datetime import UTC, datetime

import pytest

from fedlora.rounds import round_stats
from fedlora.rounds.round_stats import RoundStats


def test_the_time_of_a_phase_within_another_counts_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(round_stats.time, "perf_counter", lambda: now[0])
    stats = RoundStats(1, datetime.now(UTC))
    with stats.timed("merge"):
        now[0] += 1.0
        with stats.timed("train"):
            now[0] += 10.0
        now[0] += 2.0
    assert stats.seconds == pytest.approx({"train": 10.0, "merge": 3.0, "evaluate": 0.0})
