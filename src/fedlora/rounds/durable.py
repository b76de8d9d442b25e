"""Writes that either happen wholly or not at all, also when the power goes."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedlora.errors import RunStopped


def replace(path: Path, content: bytes) -> None:
    """Puts `content` in place of the file, by write, fsync and atomic rename: a crash leaves the old file or the new one.

    Raises:
        RunStopped: the disk is full or the folder cannot be written; the old file is as it was.
    """
    scratch = path.with_name(path.name + ".partial")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise _stopped(path, error) from error


def folder(path: Path) -> None:
    """Makes the folder if need be.

    Raises:
        RunStopped: it cannot be made.
    """
    try:
        if not path.is_dir():
            folder(path.parent)
            path.mkdir(exist_ok=True)
            _sync_folder(path.parent)
    except OSError as error:
        raise _stopped(path, error) from error


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder beside this one, which takes its place at the end; nothing of it is left if that is not reached.

    What a process that was killed has left there is removed first. Not synced: for what can be written again.

    Raises:
        OSError: it cannot be written, or the folder is there at the end and not empty.
    """
    folder = folder.resolve()  # a link stays one
    partial = folder.with_name(f".{folder.name}.fedlora-partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def append(path: Path, content: bytes) -> None:
    """Adds `content` at the end of the file and syncs it; a crash may leave a part of it.

    Raises:
        RunStopped: the disk is full or the file cannot be written.
    """
    try:
        with path.open("ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _stopped(path, error) from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _stopped(path: Path, error: OSError) -> RunStopped:
    """The error to raise when `path` cannot be written."""
    return RunStopped(f"cannot write {path}: {error.strerror or error}; the last complete round is intact")
