"""Helpers for the tests of the commands."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w

Command = Callable[..., tuple[int, str, str]]
CLIENTS = {"count": 3, "partition": "iid"}


def write(path: Path, table: dict[str, Any]) -> None:
    path.write_text(tomli_w.dumps(table))


def assert_refused(result: tuple[int, str, str], *parts: str) -> None:
    code, _, errors = result
    assert code == 2
    assert re.fullmatch(r"error: [^\n]+\n", errors)
    for part in parts:
        assert part in errors
