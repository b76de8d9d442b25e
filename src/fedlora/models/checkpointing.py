"""Gradient checkpointing: the activations of a block are not stored, but computed again in the backward pass."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Protocol

from torch import nn
from torch.utils.checkpoint import checkpoint

from fedlora.errors import UserError


class Mode(Protocol):
    """A mode of torch functions that changes what a block computes, such as dropout by clients."""

    def again(self) -> Callable[[], AbstractContextManager[None]]:
        """A context in which a block is computed again as one that is called now."""


class Checkpointing:
    """The function through which transformers calls each block of a model in training, once it is enabled.

    A block is computed again in the same modes. Dropout that the model draws from torch's own generators is repeated by
    torch.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self.modes: Sequence[Mode] = ()
        """The modes of a pass in training; torch leaves them before its backward pass."""
        self.blocks: Sequence[Any] = ()
        """The blocks that are computed again; none if it is not enabled."""

    def enable(self) -> None:
        """Stores only the inputs of the blocks from now on.

        Raises:
            UserError: see `checkpointed_blocks`.
        """
        self.blocks = checkpointed_blocks(self._model)
        self._model.config.use_cache = False  # it cannot be filled twice; generation sets it for itself
        for block in self.blocks:
            block._gradient_checkpointing_func = self
        self._switch(True)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Context in which all activations are stored."""
        self._switch(False)
        try:
            yield
        finally:
            self._switch(True)

    def _switch(self, on: bool) -> None:
        for block in self.blocks:
            block.gradient_checkpointing = on

    def __call__(self, block: Callable[..., Any], *args: Any) -> Any:
        """The output of the block."""
        modes = [mode.again() for mode in self.modes]

        @contextmanager
        def again() -> Iterator[None]:
            with ExitStack() as stack:
                for mode in modes:
                    stack.enter_context(mode())
                yield

        return checkpoint(block, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again()))


def checkpointed_blocks(model: nn.Module) -> list[Any]:
    """The blocks that transformers can call through a function of ours.

    Other modules that have a switch for checkpointing are left alone: T5's attention computes with another kernel then.

    Raises:
        UserError: there are none; names the model's type.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer  # takes two seconds to import

    whole: Any = model
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not (blocks and whole.supports_gradient_checkpointing):
        raise UserError(
            f"train.gradient_checkpointing is not supported by models of type {whole.config.model_type!r}; set it to false"
        )
    return blocks
