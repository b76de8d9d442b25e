"""Normalization of a batch's examples with each other."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedlora.errors import UserError


def check_normalization(model: nn.Module) -> None:
    """Rejects models whose examples influence each other in training.

    Raises:
        UserError: the model has batch normalization; names the module.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            raise UserError(
                f"{name} normalizes over the examples of a batch, so that no example has a gradient of its own; "
                "privacy.unit = 'record' needs a model without batch normalization"
            )
