"""Structure of adapters."""

from fedlora.adapter import Adapter


def structure(adapter: Adapter) -> frozenset[tuple[str, type, int]]:
    """Structure that adapters loaded together must share: names, types, and the `structure` of each part, which
    zero-padding at the end would change.

    Ranks and numbers of heads may differ.
    """
    return frozenset((name, type(part), part.structure) for name, part in adapter.items())
