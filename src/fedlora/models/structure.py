"""Structure of adapters."""

from fedlora.adapter import Adapter, Factors
from fedlora.linalg.lowrank import Experts, Heads


def structure(adapter: Adapter) -> frozenset[tuple[str, type, int]]:
    """Structure that adapters loaded together must share: names, types, number of experts, rank of a head.

    Ranks and numbers of heads may differ.
    """
    return frozenset((name, type(part), _blocks(part)) for name, part in adapter.items())


def _blocks(part: Factors) -> int:
    """Size of the block structure, which zero-padding at the end would misalign; 0 for parts without one."""
    return len(part.g) if isinstance(part, Experts) else part.c.shape[-1] if isinstance(part, Heads) else 0
