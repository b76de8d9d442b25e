"""Torch's attention in separate steps, for interceptors that need the attention weights or a subset of the rows."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Attention(NamedTuple):
    """A call of `scaled_dot_product_attention`: query [rows, heads, queries, size], key and value [rows, heads or fewer,
    keys, size]; with fewer key heads, groups of query heads share one."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def fused(self) -> Tensor:
        """The result, [rows, heads, queries, size], from torch's own kernels."""
        return functional.scaled_dot_product_attention(*self[:6], scale=self.scale, enable_gqa=self.enable_gqa)

    def weights(self) -> Tensor:
        """Attention weights [rows, heads, queries, keys] before dropout, as in torch: zeros for a query without any key."""
        query, key = self.query, self._of_each_head(self.key)
        scores = (query * (query.shape[-1] ** -0.5 if self.scale is None else self.scale)) @ key.mT
        if self.is_causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        if (mask := self.attn_mask) is not None:
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, float("-inf"))
            scores = scores + mask
            without_key = scores.detach().amax(-1, keepdim=True).isneginf()  # a softmax, and its gradient, would be 0 / 0
            return scores.masked_fill(without_key, 0).softmax(-1).masked_fill(without_key, 0)
        return scores.softmax(-1)

    def weighted(self, weights: Tensor) -> Tensor:
        """The attention output for these weights."""
        return weights @ self._of_each_head(self.value)

    def _of_each_head(self, x: Tensor) -> Tensor:
        heads = self.query.shape[1]
        return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)
