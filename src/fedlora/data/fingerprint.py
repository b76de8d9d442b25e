"""Digest of examples, by which data sets are compared."""

import hashlib
import json
from typing import Any

from datasets import Dataset

_AT_ONCE = 4096


def fingerprint(examples: Dataset) -> str:
    """The SHA-256 of all columns' names and values, in row order; takes some seconds for a million rows."""
    digest = hashlib.sha256()
    for start in range(0, len(examples), _AT_ONCE):
        digest.update(json.dumps(examples[start : start + _AT_ONCE], sort_keys=True, default=_digest).encode())
    return digest.hexdigest()


def _digest(content: Any) -> str:
    """The SHA-256 of bytes, which JSON does not have."""
    return hashlib.sha256(content).hexdigest()
