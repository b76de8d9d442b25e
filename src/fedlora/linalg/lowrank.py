"""Matrices in factored form."""

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

Rows = Float[Tensor, "*batch rows in"] | Int[Tensor, "*batch rows"]
"""Inputs of a module: vectors, or the token ids of an embedding, which stand for rows of the identity."""


@runtime_checkable
class Base(Protocol):
    """A frozen linear map W, next to which factors are applied to rows x."""

    def product(self) -> Float[Tensor, "*batch rows out"]:
        """W x."""

    def weight(self) -> Float[Tensor, "out in"]:
        """W."""

    def row_norms(self) -> Float[Tensor, " out"]:
        """The norms of the rows of W."""


@dataclass(frozen=True)
class LowRank:
    """The matrix b @ a, exactly, without a hidden scale. Leading batch axes are allowed and must agree."""

    b: Float[Tensor, "*batch out rank"]
    a: Float[Tensor, "*batch rank in"]

    in_head: ClassVar[Literal[False]] = False
    reads_input: ClassVar[bool] = False
    structure: ClassVar[int] = 0

    @property
    def rank(self) -> int:
        """Number of columns of `b`, which is the number of rows of `a`."""
        return self.b.shape[-1]

    @property
    def batch(self) -> torch.Size:
        """The sizes of the leading batch axes."""
        return self.a.shape[:-2]

    def product(self) -> Float[Tensor, "*batch out in"]:
        """The dense matrix."""
        return self.b @ self.a

    def as_two_factors(self) -> "LowRank":
        """Returns the matrix itself, which has two factors."""
        return self

    def shapes(self, out: int, in_: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the factors of a matrix [out, in] of this rank, at least 1."""
        rank = max(1, self.rank)
        return {"b": (out, rank), "a": (rank, in_)}

    def unit(self, factor: str, scale: float | Tensor) -> float | Tensor:
        """Number by which the trained factor is multiplied to give this one: b contains the scale."""
        return scale if factor == "b" else 1.0

    def times(self, x: Tensor) -> Tensor:
        """b a x for each row of x [*batch_or_rows, rows, in], in its dtype, or for each token id [*batch_or_rows, rows]."""
        return applied(x, self.a, self.b)

    def apply(self, x: Rows, dropped: Rows, scale: Tensor, base: Base) -> Float[Tensor, "*batch rows out"]:
        """scale * b a dropped, in the dtype of `dropped`."""
        return applied(dropped, self.a, self.b, scale)


def applied(x: Tensor, a: Tensor, b: Tensor, scale: Tensor | None = None, middle: Tensor | None = None) -> Tensor:
    """b (scale * middle a x) for each of the `Rows` x, in the dtype of x, or of a for token ids.

    `scale` broadcasts to [*batch, rows, rank]; `middle` is [*batch, rank, rank].
    """
    inner = times_transposed(x, a)  # [*batch, rows, rank]
    inner = inner if middle is None else inner @ middle.to(inner.dtype).mT
    inner = inner if scale is None else inner * scale.to(inner.dtype)
    return inner @ b.to(inner.dtype).mT


def times_transposed(x: Tensor, a: Float[Tensor, "*batch rank in"]) -> Tensor:
    """x a^T for each of the `Rows` x, in the dtype of x; for token ids, the columns of a that they select."""
    if x.is_floating_point():
        return x @ a.to(x.dtype).mT
    if a.ndim == 2:
        return a.mT[x]
    return a.mT.gather(-2, x[..., None].expand(*x.shape, a.shape[-2]))


def beside_identity(matrix: Float[Tensor, "*batch out in"]) -> LowRank:
    """The matrix and an identity as factors, of rank min(out, in)."""
    *batch, out, in_ = matrix.shape
    one = torch.eye(min(out, in_), dtype=matrix.dtype, device=matrix.device).expand(*batch, -1, -1)
    return LowRank(b=matrix, a=one) if in_ <= out else LowRank(b=one, a=matrix)


def block_diagonal(blocks: Float[Tensor, "*batch heads rank rank"]) -> Float[Tensor, "*batch ranks ranks"]:
    """The square matrix with these blocks on its diagonal, in this order, and zeros elsewhere."""
    heads, rank = blocks.shape[-3], blocks.shape[-1]
    one = torch.eye(heads, dtype=blocks.dtype, device=blocks.device)
    blocked = blocks[..., :, :, None, :] * one[:, None, :, None]  # [*batch, head, row, other head, column]
    return blocked.reshape(*blocks.shape[:-3], heads * rank, heads * rank)
