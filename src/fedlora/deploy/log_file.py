"""Log files of processes."""

from pathlib import Path


def last_log_line(log: Path) -> str:
    """Last non-empty line of the log."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "(the log is empty)")
