"""Index maps between the layouts of a pass's tokens: padded, packed, by client, and in buckets of similar length."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

_NEAR = 0.75  # fraction of the longest example of a bucket: shorter examples go to another bucket


@dataclass(frozen=True)
class Bucket:
    """Examples of similar length whose attention is computed together: their rows [n], and the longest length."""

    rows: Tensor
    longest: int


@dataclass(frozen=True)
class Layout:
    """Position of each token of a pass in the packed form [1, tokens, ...] and in three others: padded
    [rows, longest, ...], by client [clients, tokens of the largest client, ...], and concatenated buckets [places, ...].

    `first` is the layout of the examples' first tokens only, whose positions are `at_first`; it has no buckets.
    """

    packed: tuple[int, int]
    padded: tuple[int, int]
    at_padded: Int[Tensor, " tokens"]
    by_client: tuple[int, int]
    at_client: Int[Tensor, " tokens"]
    buckets: tuple[Bucket, ...]
    at_bucket: Int[Tensor, " places"]
    first: "Layout | None" = None
    at_first: Int[Tensor, " examples"] | None = None

    @staticmethod
    def of(lengths: Int[Tensor, "clients run"], device: torch.device) -> "Layout":
        """The layout for each client's examples of these lengths. Length 0 marks a filler row, which the packed form
        omits; it is at most as long as the longest example."""
        clients, run = lengths.shape
        of_row = lengths.flatten()
        longest, max_tokens = int(of_row.max()), int(lengths.sum(1).max())
        row, at = (torch.arange(longest) < of_row[:, None]).nonzero(as_tuple=True)
        before = lengths.cumsum(1) - lengths  # tokens of the same client
        by_client = (before + torch.arange(clients)[:, None] * max_tokens).flatten()
        ranked = of_row.argsort(descending=True, stable=True)[: int((of_row > 0).sum())]
        descending, cuts = of_row[ranked].tolist(), [0]
        for i, length in enumerate(descending):
            if length < _NEAR * descending[cuts[-1]]:
                cuts.append(i)
        buckets, starts, start = [], torch.zeros_like(of_row), 0
        for begin, end in pairwise([*cuts, len(descending)]):
            width, rows = descending[begin], ranked[begin:end]
            starts[rows] = start + width * torch.arange(end - begin)
            start += width * (end - begin)
            buckets.append(Bucket(rows.to(device), width))
        real = (lengths > 0).long()
        examples = int(real.sum(1).max())
        place = (real.cumsum(1) - 1 + torch.arange(clients)[:, None] * examples).flatten()
        real_rows = of_row.nonzero()[:, 0]
        first = Layout(
            packed=(1, len(real_rows)),
            padded=(clients * run, longest),
            at_padded=(real_rows * longest).to(device),
            by_client=(clients, examples),
            at_client=place[real_rows].to(device),
            buckets=(),
            at_bucket=real_rows[:0].to(device),
        )
        return Layout(
            packed=(1, len(row)),
            padded=(clients * run, longest),
            at_padded=(row * longest + at).to(device),
            by_client=(clients, max_tokens),
            at_client=(by_client[row] + at).to(device),
            buckets=tuple(buckets),
            at_bucket=(starts[row] + at).to(device),
            first=first,
            at_first=(at == 0).nonzero()[:, 0].to(device),
        )

    def pack(self, x: Tensor) -> Tensor:
        """[rows, longest, ...] to [1, tokens, ...]."""
        return _taken(x.flatten(0, 1), self.at_padded)[None]

    def unpack(self, x: Tensor) -> Tensor:
        """[1, tokens, ...] to [rows, longest, ...]; shorter examples are zero-padded."""
        return _placed(x[0], self.at_padded, *self.padded)

    def to_client_axis(self, x: Tensor) -> Tensor:
        """[1, tokens, ...] to [clients, tokens of the largest client, ...]; clients with fewer tokens are zero-padded."""
        return _placed(x[0], self.at_client, *self.by_client)

    def from_client_axis(self, x: Tensor) -> Tensor:
        """[clients, tokens of the largest client, ...] to [1, tokens, ...]."""
        return _taken(x.flatten(0, 1), self.at_client)[None]

    def select_first(self, x: Tensor) -> Tensor:
        """[1, tokens, ...] to the packed form of `first`."""
        assert self.at_first is not None
        return _taken(x[0], self.at_first)[None]

    def split(self, x: Tensor) -> list[Tensor]:
        """[1, heads, tokens, size] to [n, heads, longest, size] of each bucket."""
        sizes = [len(bucket.rows) * bucket.longest for bucket in self.buckets]
        parts = torch.split(_placed(x[0].transpose(0, 1), self.at_bucket, sum(sizes)), sizes)
        return [
            part.view(-1, bucket.longest, *part.shape[1:]).transpose(1, 2)
            for part, bucket in zip(parts, self.buckets, strict=True)
        ]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`."""
        flat = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts])
        return _taken(flat, self.at_bucket).transpose(0, 1)[None]

    def squares(self, x: Tensor) -> list[Tensor]:
        """Each bucket's part of a tensor over pairs of tokens [rows or 1, heads or 1, longest, longest]."""
        rows = [bucket.rows if len(x) > 1 else 0 for bucket in self.buckets]
        cut = [slice(bucket.longest) for bucket in self.buckets]
        return [x[..., own, own][row] for row, own in zip(rows, cut, strict=True)]


class _Take(torch.autograd.Function):
    """Selects rows of x, each at most once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, at: Tensor) -> Tensor:
        """[places, *rest] to [rows, *rest]."""
        ctx.save_for_backward(at)
        ctx.size = len(x)
        return x.index_select(0, at)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The gradient at the selected rows, zero elsewhere."""
        return _placed(gradient, ctx.saved_tensors[0], ctx.size), None


class _Place(torch.autograd.Function):
    """Writes the rows of x into a zero tensor; the inverse of `_Take`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, at: Tensor, size: int) -> Tensor:
        """[rows, *rest] to [size, *rest]."""
        ctx.save_for_backward(at)
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, at, x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """The gradient at the written rows."""
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


def _taken(x: Tensor, at: Tensor) -> Tensor:
    taken: Tensor = _Take.apply(x, at)  # type: ignore[no-untyped-call]
    return taken


def _placed(x: Tensor, at: Tensor, *places: int) -> Tensor:
    placed: Tensor = _Place.apply(x, at, math.prod(places))  # type: ignore[no-untyped-call]
    return placed.view(*places, *x.shape[1:])
