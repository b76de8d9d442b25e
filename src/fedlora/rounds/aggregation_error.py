"""Distance of what a round did to the global model from the mean of what its clients' uploads stand for."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fedlora.adapter import Adapter
from fedlora.linalg.lowrank import LowRank
from fedlora.linalg.mean_update import MeanUpdate
from fedlora.method import changes


@dataclass(frozen=True)
class ClientUpdates:
    """Weighted mean of the changes of the modules' weights that uploads stand for; None once one stands for none."""

    mean: MeanUpdate | None = field(default_factory=MeanUpdate)

    def add(self, weight: float, update: Mapping[str, LowRank] | None) -> "ClientUpdates":
        """The mean with one more upload."""
        if self.mean is None or update is None:
            return ClientUpdates(None)
        return replace(self, mean=self.mean.add(weight, update))

    def error(self, before: Adapter, after: Adapter, base_update: Mapping[str, LowRank] | None) -> float | None:
        """|mean - (base update + change of the global product)| / |mean|, Frobenius over all modules; 0 if the mean is 0.

        `before` and `after` are the global adapters before and after the merge. None where that is not defined: the uploads
        stand for no change, or the adapter has no product.
        """
        one, other = two_factors(before), two_factors(after)
        if self.mean is None or one is None or other is None or not self.mean.weight > 0:
            return None
        return self.mean.error(base_update or {}, changes(other, one))


def two_factors(adapter: Adapter) -> dict[str, LowRank] | None:
    """The products of the adapter's modules; None if they depend on the input."""
    found: dict[str, LowRank] = {}
    for name, part in adapter.items():
        if not part.in_head:
            if (two := part.as_two_factors()) is None:
                return None
            found[name] = two
    return found
