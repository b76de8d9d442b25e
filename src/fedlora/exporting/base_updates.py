"""Adapters that include a run's base updates."""

from collections.abc import Mapping, Sequence

from fedlora.adapter import Adapter
from fedlora.exporting.write import two_factors
from fedlora.linalg.combine import stack
from fedlora.linalg.fit import recompress
from fedlora.linalg.lowrank import LowRank


def with_base_updates(view: Adapter, base_updates: Sequence[Mapping[str, LowRank]]) -> Adapter:
    """Combines the adapter and the base updates in one adapter, of the numerical rank of their sum."""
    return {
        name: part
        if part.in_head or not any(name in base_update for base_update in base_updates)
        else recompress(stack([(1.0, one) for one in (two_factors(part), *(f[name] for f in base_updates if name in f))]))
        for name, part in view.items()
    }
