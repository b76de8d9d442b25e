"""Validation of the scores that clients report."""

from dataclasses import dataclass

from fedlora.deploy.wire import ClientResult
from fedlora.messages import ClientInfo

_LARGEST = 1e10  # bound of a metric: keeps sums over all clients finite


@dataclass(frozen=True)
class ScoreCheck:
    """Validates scores by the task's metrics and the held-out fraction of a client's examples."""

    metrics: frozenset[str]
    held_out: float

    def rejection_reason(self, result: ClientResult, client: ClientInfo) -> str | None:
        """Reason for rejecting a client's score, None if valid: no examples and no metrics, or all metrics of the task."""
        allowed = self.held_out * (client.examples + 1) / (1 - self.held_out) + 1  # held-out counts are rounded
        if result.examples > (allowed if self.held_out else 0):
            return f"it covers {result.examples} examples; {client.examples} training examples allow at most {allowed:.0f}"
        if result.metrics.keys() != (self.metrics if result.examples else set()):
            return f"its {len(result.metrics)} metrics are not {', '.join(sorted(self.metrics))}"
        if large := sorted(name for name, value in result.metrics.items() if abs(value) > _LARGEST):
            return f"its {large[0]} is beyond {_LARGEST:g}"
        return None
