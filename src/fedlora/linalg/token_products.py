"""Matrices of rows of tokens that are not formed, but kept as their products."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class TokenProducts:
    """The matrices sum_t p_t q_t^T [out, in] over the tokens of each row.

    q may be token ids, which stand for rows of the identity. `size` is (out, in). Results are in at least fp32.
    """

    p: Float[Tensor, "rows tokens out"]
    q: Float[Tensor, "rows tokens in"] | Int[Tensor, "rows tokens"]
    size: tuple[int, int]

    def norms(self) -> Float[Tensor, " rows"]:
        """The Frobenius norms.

        If two Gram matrices over the tokens are smaller than a matrix: sum_{t,t'} (p_t . p_t') (q_t . q_t'), plus a margin
        for its rounding error, as it would come out too small where tokens cancel each other. Otherwise one matrix is
        formed after the other.
        """
        out, in_ = self.size
        if 2 * self.p.shape[1] ** 2 > out * in_:
            one = torch.ones(1, device=self.p.device)
            return torch.stack([self.select(row).weighted_sum(one).norm() for row in torch.arange(len(self.p))[:, None]])
        p, q = _precise(self.p), self.q
        if q.is_floating_point():
            q = _precise(q)
            grams, lengths = q @ q.mT, q.square().sum((1, 2))
        else:
            grams, lengths = q[:, :, None] == q[:, None], p.new_tensor(q.shape[1])
        rounding = 4 * torch.finfo(p.dtype).eps * p.square().sum((1, 2)) * lengths
        return ((p @ p.mT * grams).sum((1, 2)) + rounding).clamp_min(0).sqrt()

    def select(self, rows: Int[Tensor, " rows"]) -> "TokenProducts":
        """Those of these rows alone."""
        return TokenProducts(self.p[rows], self.q[rows], self.size)

    def weighted_sum(self, weights: Float[Tensor, " rows"]) -> Float[Tensor, "out in"]:
        """The sum of the rows' matrices, multiplied by these weights."""
        p, q = (_precise(self.p) * weights[:, None, None]).flatten(0, 1), self.q.flatten(0, 1)
        if q.is_floating_point():
            return p.mT @ _precise(q)
        out, in_ = self.size
        return p.new_zeros(in_, out).index_add_(0, q, p).mT


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
