"""Packed examples: concatenated instead of padded to the longest, so that transformer blocks process no padding."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, no_type_check

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fedlora.models.attention import Attention
from fedlora.models.layout import Layout

_SUMS = frozenset({torch.add, Tensor.add, Tensor.add_})


class Packing(TorchFunctionMode):
    """Mode in which a model's blocks compute a pass's tokens in the packed form.

    The model is called with padded inputs. Before each block, tensors with an entry per token are packed; the output of
    the last block is padded again, so that embeddings and head are unaffected. Attention is computed bucket by bucket,
    with the model's own mask cut to the bucket. This requires a single list of blocks that call torch's
    `scaled_dot_product_attention` and otherwise process each token independently, which `try_out` tests.

    After the attention of the last block, only the tokens that are read later are computed: its modules get these, and
    where it adds them to all tokens, as in its residual sums, these are reduced, too. This is also tested.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        _limit_kernel_caches()
        self.inside: Layout | None = None
        """The layout of the packed tokens inside the blocks; None outside the blocks and in the padded form."""
        self._layout: Layout | None = None
        self.works = False
        """Whether the packed form is used."""
        self.narrows = False
        """Whether the last block continues after its attention with the tokens alone that are read later."""
        self._last = self._attended = False  # the last block is running; its attention is done
        self._trying = False  # uncomputed entries are NaN, so that any use is detected
        self._narrowed = False  # there were any
        self._selects = False  # the modules of the last block select the tokens that are read
        self._blocks = _blocks(model)
        for block in self._blocks:
            block.register_forward_pre_hook(self._enter, with_kwargs=True)
        if self._blocks:
            self._blocks[-1].register_forward_hook(self._leave)

    def try_out(self, call: Callable[[], Tensor], tolerance: float) -> None:
        """Enables the packed form, and narrowing, each if `call` then returns the same [rows, width] as in the padded form.

        `call` calls the model within `of`, and its result depends on all outputs of the model that are used later.
        """
        self.works = self.narrows = False
        if not self._blocks:
            return
        try:
            expected = call()
        except torch.OutOfMemoryError:
            raise
        except Exception:  # the padded form reports the error
            return
        for works, narrows in ((True, True), (True, False), (False, False)):
            self.enable(works, narrows)
            self._trying, self._narrowed = True, False
            try:
                difference = (call() - expected).norm() / expected.norm()
            except torch.OutOfMemoryError:  # which says nothing about the architecture
                raise
            except Exception:  # any error of an architecture that does not fit
                continue
            finally:
                self._trying = False
            if difference < tolerance and self._narrowed == self.narrows:
                return

    def enable(self, works: bool, narrows: bool) -> None:
        """Sets whether the packed form is used, and narrowing, as an earlier `try_out` of the same model did."""
        self.works, self.narrows = works, narrows
        if narrows and not self._selects:
            self._selects = True
            for module in self._blocks[-1].modules():
                if module is not self._blocks[-1]:
                    module.register_forward_pre_hook(self._select_read, with_kwargs=True)

    @contextmanager
    def of(
        self,
        lengths: Int[Tensor, "clients run"],
        device: torch.device,
        read: Bool[Tensor, "rows longest"] | None = None,
    ) -> Iterator[Layout | None]:
        """Packs calls of the model with examples of these lengths (0: filler); yields None if they are computed padded.

        Of the output of the last block, only the tokens in `read` are read (None: all); others may be zero.
        """
        if not self.works:
            yield None
            return
        self._layout = Layout.of(lengths, device, read if self.narrows else None)
        try:
            with self:
                yield self._layout
        finally:
            self._layout = self.inside = None  # also after a block has failed
            self._attended = False

    def again(self) -> Callable[[], AbstractContextManager[None]]:
        """A context in which a block is computed again as one that is called now."""
        state = self._layout, self.inside, self._last, self._attended

        @contextmanager
        def restored() -> Iterator[None]:
            before = self._layout, self.inside, self._last, self._attended
            self._layout, self.inside, self._last, self._attended = state
            try:
                with nullcontext() if self._layout is None else self:
                    yield
            finally:
                self._layout, self.inside, self._last, self._attended = before

        return restored

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if (layout := self._layout) is None:
            return None
        self.inside, self._last = layout, block is self._blocks[-1]
        return _pack(args, layout), _pack(kwargs, layout)

    def _select_read(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if not self._attended or (layout := self._layout) is None:
            return None
        self.inside = layout.read
        return _narrowed(args, layout), _narrowed(kwargs, layout)

    def _leave(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if (layout := self.inside) is None:
            return None
        narrowed, self.inside, self._attended = self._attended, None, False
        self._narrowed |= narrowed
        packed = output if isinstance(output, Tensor) else output[0]
        padded = layout.unpack(packed)
        if self._trying and narrowed:
            padded = padded.where(layout.unpack(torch.ones_like(packed)) > 0, float("nan"))
        return padded if isinstance(output, Tensor) else (padded, *output[1:])

    @no_type_check  # called for every torch operation
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is functional.scaled_dot_product_attention and self.inside is not None:
            self._attended = self._last and self.inside.read is not None
            return _attention(self.inside, Attention(*args, **(kwargs or {})))
        if self._attended and func in _SUMS and _are_mixed(args, self._layout):
            args = _narrowed(args, self._layout)
        return func(*args, **(kwargs or {}))


def _limit_kernel_caches() -> None:
    """Limits two caches of this process, unless the user has; takes effect only before the first computation.

    oneDNN, and ideep, through which torch calls it, each cache the kernels of a thousand shapes by default, with up to
    half a megabyte per shape. Packed shapes rarely recur in another step.
    """
    for key in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(key, "64")


def _attention(layout: Layout, call: Attention) -> Tensor:
    """Attention output [1, heads, tokens, size]. Dropout is one call on the concatenated weights of all buckets."""
    split = [layout.split(x) for x in (call.query, call.key, call.value)]
    masks = [None] * len(layout.buckets) if call.attn_mask is None else layout.squares(call.attn_mask)
    each = [
        call._replace(query=query, key=key, value=value, attn_mask=mask)
        for query, key, value, mask in zip(*split, masks, strict=True)
    ]
    if call.dropout_p == 0:
        return layout.join([one.fused() for one in each])
    weights = [one.weights() for one in each]
    flat = functional.dropout(torch.cat([w.flatten() for w in weights]), call.dropout_p)
    parts = torch.split(flat, [w.numel() for w in weights])
    return layout.join([one.weighted(part.view_as(w)) for one, part, w in zip(each, parts, weights, strict=True)])


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The model's blocks in order; empty unless the model has exactly one list of them."""
    from transformers.modeling_layers import GradientCheckpointingLayer  # takes two seconds to import

    lists = [
        list(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and {issubclass(type(one), GradientCheckpointingLayer) for one in module} == {True}
    ]
    return lists[0] if len(lists) == 1 else []


def _pack(x: Any, layout: Layout) -> Any:
    """Packs all tensors that have an entry for each token."""
    rows, longest = layout.padded

    def pack(x: Tensor) -> Tensor:
        if x.ndim in (2, 3) and x.shape[1] == longest and x.shape[0] in (1, rows):
            return layout.pack(x.expand(rows, *x.shape[1:]))
        return x

    return _each_tensor(x, pack)


def _narrowed(x: Any, layout: Layout) -> Any:
    """Reduces all packed tensors to the tokens that are read."""
    return _each_tensor(x, lambda one: layout.select_read(one) if tuple(one.shape[:2]) == layout.packed else one)


def _are_mixed(args: Sequence[Any], layout: Layout | None) -> bool:
    """Whether the terms of a sum have all tokens, and those that are read."""
    if layout is None or layout.read is None:
        return False
    sizes = {tuple(x.shape[:2]) for x in args if isinstance(x, Tensor)}
    return sizes == {layout.packed, layout.read.packed} and layout.packed != layout.read.packed


def _each_tensor(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, tuple):
        return tuple(_each_tensor(one, change) for one in x)
    return {key: _each_tensor(one, change) for key, one in x.items()} if isinstance(x, dict) else x
