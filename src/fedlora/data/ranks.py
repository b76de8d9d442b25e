"""Assignment of ranks to clients."""

import torch

from fedlora.config.sections import RankNames
from fedlora.randomness import generator

# Percentages of clients with an eighth, a quarter, a half and the whole of the largest rank.
_PERCENT: dict[str, tuple[int, int, int, int]] = {
    "uniform": (25, 25, 25, 25),
    "heavy-tail-light": (85, 5, 5, 5),
    "heavy-tail-strong": (5, 5, 5, 85),
    "normal": (6, 44, 44, 6),
}


def client_ranks(choice: list[int] | RankNames | None, count: int, largest: int, seed: int) -> list[int]:
    """The rank of each of `count` clients: all `largest`, as listed, or a named distribution in a seeded random order.

    A distribution has four ranks: an eighth, a quarter, a half and the whole of `largest`, rounded up. uniform: a
    quarter of the clients has each rank; heavy-tail-light: 85 % have the smallest rank; heavy-tail-strong: 85 % have
    the largest; normal: a bell curve over the four. The numbers of clients are these shares, rounded; they are not
    random.

    Source: Bai et al. 2024, arXiv:2402.11505, figure 3 (FlexLoRA). The 85 % are from its readme (its code has
    80/10/5/5). The bell curve is a normal density over the four ranks, numbered 0 to 3, with standard deviation 0.7.
    FlexLoRA's ranks are 8, 30, 30 or 200 depending on the module, and 200; the fractions here give four different ranks
    if `largest` is 8 or more.

    >>> sorted(client_ranks("uniform", count=4, largest=16, seed=0))
    [2, 4, 8, 16]
    """
    if choice is None:
        return [largest] * count
    if isinstance(choice, list):
        return list(choice)
    ordered = _ordered(_PERCENT[choice], count, largest)
    return [ordered[i] for i in torch.randperm(count, generator=generator(seed, "ranks")).tolist()]


def _ordered(percent: tuple[int, ...], count: int, largest: int) -> list[int]:
    """Ranks in ascending order: client i of `count` has the rank at the quantile (i + 1/2) / count."""
    ranks = [-(-largest // 8), -(-largest // 4), -(-largest // 2), largest]
    by_percent = [rank for rank, share in zip(ranks, percent, strict=True) for _ in range(share)]
    return [by_percent[(2 * i + 1) * 100 // (2 * count)] for i in range(count)]
