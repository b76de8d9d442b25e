"""The numbers of private steps that clients may make."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fedlora.messages import FitRequest


@dataclass(frozen=True)
class Budgets:
    """The most steps of some clients in all their trainings of a run, and the number of steps of a training."""

    most_steps: Mapping[str, int] = field(default_factory=dict)
    steps: Callable[[FitRequest], int] | None = None

    def exceeded(self, asked: FitRequest, made: int) -> str | None:
        """The reason why a client that has made this many steps sits out instead of training; None if it trains."""
        if asked.client.id not in self.most_steps:
            return None
        assert self.steps is not None
        allowed, steps = self.most_steps[asked.client.id], self.steps(asked)
        if made + steps <= allowed:
            return None
        return f"its privacy budget is spent: it has made {made} of {allowed} steps, and this training would make {steps}"
