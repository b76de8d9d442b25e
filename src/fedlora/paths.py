"""Paths of models and data in settings."""

from pathlib import Path


def is_folder(source: str) -> bool:
    """Whether a model's source is a folder, or has the form of a path."""
    return source.startswith((".", "/", "~")) or Path(source).is_dir()


def absolute(name: str) -> str:
    """Absolute form of a path; symbolic links are kept."""
    return str(Path(name).expanduser().absolute())
