"""Digest of a large file, which a process reads only once."""

import hashlib
from functools import lru_cache
from pathlib import Path


def sha256(path: Path) -> str:
    """SHA-256 of a file; a file whose size and times are those of an earlier call is not read again.

    Raises:
        OSError: it cannot be read.
    """
    found = path.stat()
    return _sha256(path, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@lru_cache(maxsize=256)
def _sha256(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
