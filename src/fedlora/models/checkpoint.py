"""Facts about a model's weights on disk."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Checkpoint:
    """Facts about the weights on disk."""

    new: tuple[str, ...]
    """Randomly initialized parameters: the checkpoint lacks them, or has them in another size."""
    dtype: torch.dtype
    """Data type in which they are stored."""
    notes: tuple[str, ...] = ()
    """Notes for the user."""
