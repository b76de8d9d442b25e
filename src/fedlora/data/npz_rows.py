"""Columns of NumPy's .npz files."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np


def columns(path: Path) -> dict[str, list[Any]]:
    """Each array's entries along its first axis: Python values of a one-dimensional array, else arrays.

    Raises:
        ValueError: not a .npz file, an array has pickled objects, or no axis, or the arrays have different lengths.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError("it is not a .npz file, or not complete")
    with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    if any(not array.ndim for array in arrays.values()):
        raise ValueError("an array has no axis; expected one entry for each example")
    if len({len(array) for array in arrays.values()}) > 1:
        raise ValueError("the arrays have different lengths")
    return {name: array.tolist() if array.ndim == 1 else list(array) for name, array in arrays.items()}
