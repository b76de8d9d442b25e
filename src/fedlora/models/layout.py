"""Index maps between the layouts of a pass's tokens: padded, packed, by client, and in buckets of similar length."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Int
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

    `read` is the layout of the tokens alone that are read after the last block, whose positions are `at_read`; it has no
    buckets. None: all are read.
    """

    packed: tuple[int, int]
    padded: tuple[int, int]
    at_padded: Int[Tensor, " tokens"]
    by_client: tuple[int, int]
    at_client: Int[Tensor, " tokens"]
    buckets: tuple[Bucket, ...]
    at_bucket: Int[Tensor, " places"]
    read: "Layout | None" = None
    at_read: Int[Tensor, " read"] | None = None

    @staticmethod
    def of(
        lengths: Int[Tensor, "clients run"], device: torch.device, read: Bool[Tensor, "rows longest"] | None = None
    ) -> "Layout":
        """The layout for each client's examples of these lengths, of which the tokens in `read` are read; None: all.

        Length 0 marks a filler row, which the packed form omits; it is at most as long as the longest example.
        """
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
        layout = Layout(
            packed=(1, len(row)),
            padded=(clients * run, longest),
            at_padded=(row * longest + at).to(device),
            by_client=(clients, max_tokens),
            at_client=(by_client[row] + at).to(device),
            buckets=tuple(buckets),
            at_bucket=(starts[row] + at).to(device),
        )
        if read is None:
            return layout
        at_read = read.cpu()[row, at].nonzero()[:, 0]
        client = row[at_read] // run
        counts = client.bincount(minlength=clients)  # the tokens of a client follow each other
        place = torch.arange(len(at_read)) - (counts.cumsum(0) - counts)[client]
        most = int(counts.max())
        narrow = Layout(
            packed=(1, len(at_read)),
            padded=layout.padded,
            at_padded=layout.at_padded[at_read.to(device)],
            by_client=(clients, most),
            at_client=(client * most + place).to(device),
            buckets=(),
            at_bucket=at_read[:0].to(device),
        )
        return replace(layout, read=narrow, at_read=at_read.to(device))

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

    def select_read(self, x: Tensor) -> Tensor:
        """[1, tokens, ...] to the packed form of `read`."""
        assert self.at_read is not None
        return _taken(x[0], self.at_read)[None]

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
