"""Validation of the statistics that clients report for their held-out examples."""

from collections.abc import Callable
from dataclasses import dataclass

from fedlora.adapter import Tensors
from fedlora.messages import ClientInfo, Statistics
from fedlora.rounds.codec import decode, encoded_size

_HEADER_BYTES = 4096  # by which headers of the same tensors may differ
_LARGEST = 1e15  # bound of a sum: keeps sums over all clients finite


@dataclass(frozen=True)
class ScoreCheck:
    """Validates statistics by those of no examples, the task's own check, and the held-out fraction of a client's examples.

    `own_check` returns the reason why statistics cannot be those of any examples, None if they can (see `Task.check`).
    """

    empty: Tensors
    own_check: Callable[[Statistics], str | None]
    held_out: float

    def read(self, examples: int, payload: bytes | None, client: ClientInfo) -> Statistics | None:
        """The client's statistics; None if they are of no examples.

        Raises:
            ValueError: they are invalid; the reason.
        """
        allowed = self.held_out * (client.examples + 1) / (1 - self.held_out) + 1  # held-out counts are rounded
        if examples > (allowed if self.held_out else 0):
            raise ValueError(
                f"it covers {examples} examples; {client.examples} training examples allow at most {allowed:.0f}"
            )
        if (payload is None) != (examples == 0):
            raise ValueError(f"it covers {examples} examples, and has {'no' if payload is None else 'some'} statistics")
        if payload is None:
            return None
        if len(payload) > (expected := encoded_size(self.empty) + _HEADER_BYTES):
            raise ValueError(f"its statistics have {len(payload)} bytes, expected at most {expected}")
        found = Statistics(examples, decode(payload, len(self.empty)))
        if reason := self._rejection_reason(found) or self.own_check(found):
            raise ValueError(reason)
        return found

    def _rejection_reason(self, found: Statistics) -> str | None:
        if found.sums.keys() != self.empty.keys():
            return f"its {len(found.sums)} statistics are not {', '.join(sorted(self.empty))}"
        for name, expected in self.empty.items():
            x = found.sums[name]
            if (x.shape, x.dtype) != (expected.shape, expected.dtype):
                return f"its {name} is {list(x.shape)} of {x.dtype}, expected {list(expected.shape)} of {expected.dtype}"
            if not x.dtype.is_floating_point and bool((x < 0).any()):
                return f"its {name} has a negative count"
            if not bool((x.double().abs() <= _LARGEST).all()):  # also if it is not finite
                return f"its {name} is not finite, or beyond {_LARGEST:g}"
        return None
