"""Cross-entropies of a language model at the positions that have a target, without the logits of any others."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutput

from fedlora.models.layers import LoraLayer
from fedlora.tasks.task import NO_TARGET

_LOGITS = 1 << 24
"""Logits computed at a time: 64 MB in fp32."""

T = TypeVar("T")


def token_losses(
    model: nn.Module, call: Mapping[str, Tensor], targets: Int[Tensor, "rows longest"]
) -> tuple[Float[Tensor, "rows longest"], Bool[Tensor, "rows longest"]]:
    """The cross-entropy in fp32 at each position of the decoder, and whether the target has the largest logit, the first of
    several, in a call of the model with these arguments.

    `targets` are the tokens that the positions predict; those without one (`NO_TARGET`) have 0 and False. Only the logits
    of targets are computed: some at a time, or all at once if the output layer is trained. An output layer with factors
    computes those of all positions.
    """
    at = targets != NO_TARGET
    wanted = targets[at]
    try:
        if isinstance(_whole(model).get_output_embeddings(), LoraLayer):  # it needs to see whose row each position is
            raise _NotReplacedError
        losses, right = with_decoder_output(model, call, lambda output: _of_output(model, output, at, wanted))
    except _NotReplacedError:
        logits = _whole(model)(**call, use_cache=False).logits[at]
        losses, right = _of_logits(logits, wanted)
    zeros = torch.zeros(targets.shape, device=targets.device)
    return zeros.masked_scatter(at, losses), torch.zeros_like(at).masked_scatter(at, right)


def with_decoder_output(model: nn.Module, call: Mapping[str, Tensor], compute: Callable[[Any], T]) -> T:
    """The result of a function of the output of the model's decoder, called within a call of the model.

    Raises:
        _NotReplacedError: the model has no decoder apart from its output layer, or does not call it.
    """
    whole, found = _whole(model), list[T]()
    if (decoder := whole.get_decoder()) is whole:
        raise _NotReplacedError

    def hook(_: nn.Module, args: Any, output: Any) -> Any:
        handle.remove()  # `compute` may call the decoder again
        found.append(compute(output))
        return _with_hidden(output, output.last_hidden_state[:1, :1])

    handle = decoder.register_forward_hook(hook)
    try:
        whole(**call, use_cache=False)
    finally:
        handle.remove()
    if not found:
        raise _NotReplacedError
    return found[0]


def _of_output(model: nn.Module, output: Any, at: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The losses of the selected positions [targets], and whether their predictions are right."""
    hidden = output.last_hidden_state[at]
    if _output_layer_is_trained(model):
        return _of_logits(_logits(model, output, hidden), wanted)
    size = max(1, _LOGITS // _whole(model).config.get_text_config().vocab_size)
    losses, right = [hidden.new_zeros(0, dtype=torch.float32)], [wanted.new_zeros(0, dtype=torch.bool)]
    for part, target in zip(torch.split(hidden, size), torch.split(wanted, size), strict=True):
        of_part, hits = _Losses.apply(part, target, lambda x: _logits(model, output, x))  # type: ignore[no-untyped-call]
        losses.append(of_part)
        right.append(hits)
    return torch.cat(losses), torch.cat(right)


def _of_logits(logits: Float[Tensor, "rows vocabulary"], wanted: Int[Tensor, " rows"]) -> tuple[Tensor, Tensor]:
    losses = functional.cross_entropy(logits.float(), wanted, reduction="none")
    return losses, logits.detach().argmax(-1) == wanted


class _Losses(torch.autograd.Function):
    """Cross-entropies of rows of hidden states, with a frozen output layer.

    Each depends on its own row alone, so that its gradient is computed at once, and the logits are released.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, wanted: Tensor, logits: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """[rows, width] and [rows] to the losses and whether the prediction is right, [rows] each."""
        needed = ctx.needs_input_grad[0]
        row = hidden.detach().requires_grad_(needed)
        with torch.set_grad_enabled(needed), saved_tensors_hooks(_same, _same):  # not saved for the model's backward pass
            losses, right = _of_logits(logits(row), wanted)
        if needed:
            ctx.save_for_backward(*torch.autograd.grad(losses, row, torch.ones_like(losses)))
        ctx.mark_non_differentiable(right)
        return losses.detach(), right

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        """Each row's gradient, times that of its loss."""
        (of_loss,) = ctx.saved_tensors
        return (gradient[:, None] * of_loss).to(of_loss.dtype), None, None


class _NotReplacedError(Exception):
    """The model computes its logits without the output of its decoder."""


def _logits(model: nn.Module, output: Any, hidden: Float[Tensor, "rows width"]) -> Float[Tensor, "rows vocabulary"]:
    """The logits of these rows by the model's own code after its decoder, which may scale or cap them.

    Called within the model's call, whose hooks may have replaced parameters: these stay as they are.
    """
    whole = _whole(model)
    decoder = whole.get_decoder()
    decoder.forward = lambda *_, **__: _with_hidden(output, hidden[None])
    ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
    call: dict[str, Any] = {"input_ids": ids}
    if whole.config.is_encoder_decoder:
        call = {"encoder_outputs": BaseModelOutput(last_hidden_state=hidden[None]), "decoder_input_ids": ids}
    try:
        found: Tensor = whole.forward(**call, use_cache=False).logits[0]
    finally:
        del decoder.forward
    return found


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    """The decoder's output with other last hidden states."""
    return type(output)(**{**output, "last_hidden_state": hidden})


def _output_layer_is_trained(model: nn.Module) -> bool:
    """Whether a parameter after the decoder has a gradient; `named_parameters` does not see replaced ones."""
    whole = _whole(model)
    inside = set(whole.get_decoder().modules())
    if whole.config.is_encoder_decoder:
        inside.update(whole.get_encoder().modules())
    outside = (module for module in model.modules() if module not in inside)
    return any(x is not None and x.requires_grad for module in outside for x in module._parameters.values())


def _whole(model: nn.Module) -> Any:
    """The model, whose methods `nn.Module` does not declare."""
    return model


def _same(x: Tensor) -> Tensor:
    return x
