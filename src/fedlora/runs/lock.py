"""Exclusive access to a run's folder."""

import os
from pathlib import Path

from filelock import FileLock, Timeout

from fedlora.errors import RunStopped, UserError

LOCK = "lock"


class FolderLock:
    """Lock of a folder for this process, and the check that the path still refers to the locked folder."""

    def __init__(self, path: Path, seconds: float) -> None:
        """Locks the folder, which must exist; waits up to `seconds` for another process to release it.

        Raises:
            UserError: it does not exist, cannot be written, or is locked by another process.
        """
        self._path = path
        self._lock = FileLock(path / LOCK)
        if not path.is_dir():
            raise UserError(f"{path}: no such run directory")
        try:
            self._lock.acquire(timeout=seconds)
        except Timeout:
            raise UserError(f"{path}: locked by another process; wait for it to end, or choose another directory") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from error
        self._directory = os.open(path, os.O_RDONLY)  # held open, so that its inode is not reused

    def require(self) -> None:
        """Checks that the folder still exists at its path, so that it is not created again with only a part of the run.

        Raises:
            RunStopped: it was moved or removed.
        """
        if not self._in_place():
            raise RunStopped(
                f"{self._path}: the run directory was moved or removed; move it back, or resume it where it is"
            )

    def release(self) -> None:
        """Releases the lock; removes the folder if it contains nothing else."""
        unused = self._in_place() and [entry.name for entry in self._path.iterdir()] == [LOCK]
        if unused:
            (self._path / LOCK).unlink()
        self._lock.release()
        os.close(self._directory)
        if unused:
            self._path.rmdir()

    def _in_place(self) -> bool:
        try:
            return os.path.samestat(self._path.stat(), os.fstat(self._directory))
        except OSError:
            return False
