"""Reads examples as classification does."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from fedlora.config.sections import Data
from fedlora.data import sources
from fedlora.data.columns import Column
from fedlora.tasks.classification import Classification


def columns(data: Data) -> list[Column]:
    """The columns of a classification with these settings."""
    return Classification().columns({name for name, value in data if value is not None})


def load(data: Data, seed: int, in_memory: Any = None) -> sources.LabelledData:
    """See `sources.load`."""
    return sources.load(data, seed, columns(data), in_memory)


def load_own(data: Data, file: str, labels: Sequence[str], seed: int) -> Dataset:
    """See `sources.load_own`."""
    return sources.load_own(data, file, labels, seed, columns(data))
