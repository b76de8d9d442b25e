"""Federated fine-tuning of transformers with LoRA adapters."""

from fedlora.config import Experiment
from fedlora.version import __version__

__all__ = ["Experiment", "__version__"]
