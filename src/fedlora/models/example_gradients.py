"""The gradients of single examples from one pass of many."""

from collections.abc import Collection
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from fedlora.linalg.lowrank import Rows, times_transposed
from fedlora.linalg.token_products import TokenProducts

ExampleGradient = Tensor | TokenProducts
"""The gradients of a pass's rows [rows, *shape], of one parameter; those of a matrix are not formed."""


class ExampleGradients:
    """The gradients of a pass whose rows are examples of the clients at these places, of the parameters of these clients.

    A parameter [clients, *shape] is read through `select`, which gives each row a copy, or is a matrix [clients, out, in]
    that is applied through `times`: without copies, and with gradients that are kept as products of tokens. Those with an
    id in `copied` are copied in any case. A parameter may be used several times in the pass, always in the same way.
    """

    def __init__(self, places: Int[Tensor, " rows"], copied: Collection[int] = ()) -> None:
        self._places, self._copied = places, copied
        self._copies: dict[int, Tensor] = {}
        self._uses: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._clients = sorted(set(places.tolist()))
        self._rows = [(places == i).nonzero()[:, 0] for i in self._clients]
        self._order = torch.cat(self._rows).argsort()

    def select(self, x: Tensor) -> Tensor:
        """The entries of [clients, *shape] for each row."""
        if not x.requires_grad:
            return self._entries(x)
        if id(x) not in self._copies:
            self._copies[id(x)] = self._entries(x.detach()).requires_grad_()
        return self._copies[id(x)]

    def times(self, x: Rows, matrix: Tensor) -> Tensor:
        """matrix x [rows, tokens, out] for each row's tokens, with the matrix [clients, out, in] of its client."""
        if id(matrix) in self._copied:
            return times_transposed(x, self.select(matrix))
        own = matrix.detach()
        if len(self._clients) == 1:
            y = times_transposed(x, own[self._clients[0]])
        else:
            parts = [times_transposed(x[rows], own[i]) for i, rows in zip(self._clients, self._rows, strict=True)]
            y = torch.cat(parts)[self._order]
        uses = self._uses.setdefault(id(matrix), [])
        return _Noted.apply(y, x, matrix, uses) if matrix.requires_grad else y  # type: ignore[no-untyped-call]

    def of(self, x: Tensor) -> ExampleGradient | None:
        """The gradients of a parameter, after the backward pass; None if the pass did not use it."""
        if uses := self._uses.get(id(x)):
            p, q = (each[0] if len(uses) == 1 else torch.cat(each, 1) for each in zip(*uses, strict=True))
            return TokenProducts(p, q, (x.shape[1], x.shape[2]))
        return self._copies[id(x)].grad if id(x) in self._copies else None

    def _entries(self, x: Tensor) -> Tensor:
        """Those of each row's client, without copies if there is only one client."""
        return x.expand(len(self._places), *x.shape[1:]) if len(x) == 1 else x[self._places]


class _Noted(torch.autograd.Function):
    """y = matrix x, whose backward pass notes the gradient of y, and x, in place of the gradient of the matrix."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, matrix: Tensor, uses: list[tuple[Tensor, Tensor]]) -> Tensor:
        """y itself."""
        ctx.save_for_backward(x)
        ctx.uses = uses
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient of y alone."""
        (x,) = ctx.saved_tensors
        ctx.uses.append((gradient, x.detach()))  # without the graph of x, which would be kept
        return gradient, None, None, None
