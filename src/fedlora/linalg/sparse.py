"""Selection of the largest entries, and a compact encoding of positions, whose length both sides can compute."""

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor


def largest(sizes: Float[Tensor, "total"], count: int) -> Bool[Tensor, "total"]:
    """Mask of the `count` largest entries; among equal ones, the first. NaN counts as the largest. O(total)."""
    if count <= 0:
        return torch.zeros_like(sizes, dtype=torch.bool)
    sizes = sizes.nan_to_num(nan=torch.inf)
    least = sizes.topk(count, sorted=False).values.min()
    above, equal = sizes > least, sizes == least
    return above | (equal & (equal.cumsum(0) <= count - above.sum()))


def position_bytes(count: int, total: int) -> int:
    """The number of bytes that `pack_positions` returns; it depends only on the two numbers.

    >>> position_bytes(3, 4000), position_bytes(3000, 4000), position_bytes(4000, 4000)
    (6, 500, 0)
    """
    if count in (0, total):
        return 0
    return min(count * _width(total), -(-total // 8))


def pack_positions(chosen: Bool[Tensor, "total"]) -> UInt8[Tensor, "length"]:
    """Encodes the chosen positions as ascending integers of 1, 2, 3 ... bytes or as a bit mask, whichever is smaller.

    Lowest byte and lowest bit first. Empty if none or all are chosen.
    """
    count, total = int(chosen.sum()), len(chosen)
    length = position_bytes(count, total)
    if length == 0:
        return torch.zeros(0, dtype=torch.uint8)
    if _as_integers(count, total):
        places = chosen.nonzero().cpu()  # [count, 1]
        return (places >> (8 * torch.arange(_width(total))) & 255).to(torch.uint8).flatten()
    bits = torch.constant_pad_nd(chosen.cpu().to(torch.uint8), (0, 8 * length - total)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack_positions(packed: Tensor, count: int, total: int) -> Bool[Tensor, "total"]:
    """The inverse of `pack_positions`, for untrusted bytes.

    Raises:
        ValueError: invalid positions: not exactly `count` different ones out of `total`, or not in the canonical encoding.
    """
    length = position_bytes(count, total)
    if packed.dtype != torch.uint8 or packed.shape != (length,):
        raise ValueError(
            f"positions of {count} out of {total} are {length} bytes, got {tuple(packed.shape)} {packed.dtype}"
        )
    if length == 0:
        return torch.full((total,), count > 0)
    if _as_integers(count, total):
        places = (packed.view(count, -1).long() << (8 * torch.arange(_width(total)))).sum(1)
        if int(places[-1]) >= total or bool((places.diff() <= 0).any()):
            raise ValueError(f"invalid positions: expected ascending numbers from 0 to {total - 1} without repetition")
        return torch.zeros(total, dtype=torch.bool).index_fill(0, places, True)
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).bool().flatten()
    if bool(bits[total:].any()) or int(bits.sum()) != count:
        raise ValueError(f"expected {count} positions out of {total}, got {int(bits.sum())}")
    return bits[:total]


def _as_integers(count: int, total: int) -> bool:
    return count * _width(total) < -(-total // 8)


def _width(total: int) -> int:
    """Number of bytes of one position."""
    return max(1, -(-(total - 1).bit_length() // 8))
