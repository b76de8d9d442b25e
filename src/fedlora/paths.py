"""Which names stand for places in the file system."""

from pathlib import Path


def is_folder(source: str) -> bool:
    """Whether a model's source can only be meant as a folder, or is one."""
    return source.startswith((".", "/", "~")) or Path(source).is_dir()


def absolute(name: str) -> str:
    """The same place, whatever the working directory; a link stays one."""
    return str(Path(name).expanduser().absolute())
