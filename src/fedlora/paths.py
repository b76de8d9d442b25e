"""Paths of models and data in settings."""

from pathlib import Path

ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".csv", ".csv.gz", ".parquet", ".npz")
"""Endings of the names of data files."""


def is_local(source: str) -> bool:
    """Whether a model's source is a folder or a GGUF file, or has the form of a path."""
    if source.startswith("package:"):
        return False
    return source.startswith((".", "/", "~")) or source.endswith(".gguf") or Path(source).is_dir()


def looks_local(name: str) -> bool:
    """Whether a data source is a file, or has the form of a path."""
    return name.startswith((".", "/", "~")) or name.lower().endswith(ENDINGS) or Path(name).is_file()


def absolute(name: str) -> str:
    """Absolute form of a path; symbolic links are kept."""
    return str(Path(name).expanduser().absolute())
