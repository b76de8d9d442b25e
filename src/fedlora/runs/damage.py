"""Checks of a run's files against their checksums."""

import hashlib
from pathlib import Path
from typing import Any

from fedlora.errors import UserError
from fedlora.rounds.codec import decode_state


def read_state(path: Path) -> tuple[Any, dict[str, Any]]:
    """State and notes in a file written with `encode_state`.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return decode_state(str(path))
    except FileNotFoundError:
        raise missing(path) from None
    except (ValueError, OSError) as error:
        raise damaged(str(error)) from error


def require_digest(path: Path, digest: str) -> None:
    """Checks that the file has this SHA-256.

    Raises:
        UserError: it is missing or has changed.
    """
    if not path.exists():
        raise missing(path)
    if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        raise damaged(f"{path} has changed since it was written")


def missing(path: Path) -> UserError:
    """Error for a file that the run needs and that does not exist."""
    return damaged(f"{path} is missing")


def damaged(reason: str) -> UserError:
    """Error for a run that cannot be read, with the file and what is wrong with it."""
    return UserError(f"the run is damaged: {reason}")
