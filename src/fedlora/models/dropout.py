"""Dropout with per-client masks, so that a client's result does not depend on the others in its step."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, no_type_check

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fedlora.models.attention import Attention
from fedlora.models.packing import Packing

_LEVELS = 1 << 8  # a mask entry takes one random byte


class ClientDropout(TorchFunctionMode):
    """Context in which every dropout of a model in training draws each client's mask from the client's own generator.

    The first axis of the input has the rows of one client after the other, the same number for each, or the tokens of
    these rows, flattened; with several clients, any other tensor is an error. A client's mask has the shape that it
    would have alone: the client's own rows and longest example. Inputs are [rows, length, ...], attention weights
    [rows, heads, length, length]; with two axes there is no length. In an encoder-decoder there are two lengths, those of
    prompts and of answers (see `answer_length`). Packed tensors get the same masks as padded ones. The probability is
    rounded to a multiple of 2^-8, and kept entries are scaled up to match. Attention with dropout is computed unfused,
    since the masks inside a fused kernel are not accessible.
    """

    def __init__(self, packing: Packing | None = None, p: float | None = None) -> None:
        """`p` replaces all nonzero probabilities; None keeps them."""
        super().__init__()
        self._packing, self._p = packing, p
        self._generators: Sequence[torch.Generator] = ()
        self._sizes: Sequence[tuple[int, int]] = ()
        self._answers: Sequence[int] = ()

    def next_pass(
        self, generators: Sequence[torch.Generator], sizes: Sequence[tuple[int, int]], answers: Sequence[int] = ()
    ) -> None:
        """Sets each client's generator, and (length of its longest row, number of rows), for the next pass.

        `answers`: the length of each client's longest answer in the decoder of an encoder-decoder.
        """
        self._generators, self._sizes, self._answers = generators, sizes, answers

    def again(self) -> Callable[[], AbstractContextManager[None]]:
        """A context in which a block is computed again with the masks of one that is called now."""
        generators, sizes, states = self._generators, self._sizes, _states(self._generators)

        @contextmanager
        def restored() -> Iterator[None]:
            before = self._generators, self._sizes, _states(generators)
            self._generators, self._sizes = generators, sizes
            _set_states(generators, states)
            try:
                with self:
                    yield
            finally:
                self._generators, self._sizes, now = before
                _set_states(generators, now)

        return restored

    @no_type_check  # called for every torch operation
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.dropout:
            return self._dropout(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            return self._attention(Attention(*args, **kwargs))
        return func(*args, **kwargs)

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return input
        level = min(max(round((self._p or p) * _LEVELS), 1), _LEVELS - 1)
        kept: Tensor = _Kept.apply(  # type: ignore[no-untyped-call]
            input, self._mask(input.shape, level, input.device), _LEVELS / (_LEVELS - level)
        )
        return kept

    def _attention(self, call: Attention) -> Tensor:
        if call.dropout_p == 0:
            return call.fused()
        return call.weighted(self._dropout(call.weights(), call.dropout_p))

    def _mask(self, shape: torch.Size, level: int, device: torch.device) -> Tensor:
        """1 for kept entries, else 0; as bytes, because multiplying with bools takes many times as long."""
        layout = None if self._packing is None else self._packing.inside
        if layout is None:
            masks = self._padded(shape, device)
        elif len(shape) == 1:  # all buckets' attention weights
            heads = shape[0] // sum(len(bucket.rows) * bucket.longest**2 for bucket in layout.buckets)
            whole = self._padded((layout.padded[0], heads, layout.padded[1], layout.padded[1]), device, cut=True)
            masks = torch.cat([part.flatten() for part in layout.squares(whole)])
        elif shape[:2] == layout.packed or shape[:1] == layout.packed[1:]:
            rest = shape[2:] if shape[:2] == layout.packed else shape[1:]
            masks = layout.pack(self._padded((*layout.padded, *rest), device, cut=True)).view(shape)
        else:
            masks = self._padded(shape, device)
        return masks.ge_(level - _LEVELS // 2)

    def _padded(self, shape: Sequence[int], device: torch.device, cut: bool = False) -> Tensor:
        """Random int8 for the clients' rows. With `cut`, entries outside a client's own shape are left unset."""
        if len(self._generators) == 1:
            return _bytes(shape, self._generators[0]).to(device)
        longest, run = max(length for length, _ in self._sizes), max(rows for _, rows in self._sizes)
        rows = len(self._generators) * run
        lengths: dict[int, Sequence[int]] = {longest: [length for length, _ in self._sizes]}
        if self._answers:
            lengths[answer_length(longest, max(self._answers))] = self._answers
        if len(shape) == 2 and shape[0] != rows and shape[0] // rows in lengths and shape[0] % rows == 0:
            return self._padded((rows, shape[0] // rows, shape[1]), device, cut).flatten(0, 1)
        if shape[0] != rows:
            raise ValueError(
                f"dropout of a tensor {list(shape)}: expected the {rows} rows of the clients on its first axis"
            )
        axes = {3: (1,), 4: (2, 3)}.get(len(shape), ())
        drawn = torch.empty(len(self._generators), run, *shape[1:], dtype=torch.int8, device=device)
        for i, (state, generator, (_, real)) in enumerate(zip(drawn, self._generators, self._sizes, strict=True)):
            own = [real, *(lengths[n][i] if axis in axes and n in lengths else n for axis, n in enumerate(shape) if axis)]
            if own != list(state.shape) and not cut:
                state.fill_(_LEVELS // 2 - 1)
            state[tuple(slice(n) for n in own)] = _bytes(own, generator)
        return drawn.flatten(0, 1)


def answer_length(prompts: int, answers: int) -> int:
    """The length to which the answers of several clients are padded in a pass, given the longest prompt and answer: never
    that of the prompts, so that the shape of a tensor tells whether it has prompts or answers."""
    return answers + (answers == prompts)


class _Kept(torch.autograd.Function):
    """x * mask * scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scale: float) -> Tensor:
        """x * mask * scale."""
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return x * mask.to(x.dtype).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """gradient * mask * scale."""
        (mask,) = ctx.saved_tensors
        return gradient * mask.to(gradient.dtype).mul_(ctx.scale), None, None


def _states(generators: Sequence[torch.Generator]) -> list[Tensor]:
    return [generator.get_state() for generator in generators]


def _set_states(generators: Sequence[torch.Generator], states: Sequence[Tensor]) -> None:
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)


def _bytes(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Random int8, uniform over the whole range."""
    words = torch.empty((math.prod(shape) + 7) // 8, dtype=torch.int64, device=generator.device)
    return words.random_(-(2**63), None, generator=generator).view(torch.int8)[: math.prod(shape)].view(list(shape))
