"""File of a run's manifest, with its checksum."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.rounds import checksum
from fedlora.runs.damage import damaged

MANIFEST = "manifest.json"


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Manifest of the run in this folder, None if it has not begun.

    Raises:
        UserError: the file is damaged.
    """
    file = path / MANIFEST
    if not file.exists():
        return None
    content = file.read_bytes()
    if not checksum.intact(content):
        raise damaged(f"{file}: its checksum is missing or wrong")
    return {key: value for key, value in json.loads(content).items() if key not in checksum.EMPTY}


def encode_manifest(manifest: Mapping[str, Any]) -> str:
    """Content of the file, with its checksum."""
    return checksum.sealed(json.dumps({**checksum.EMPTY, **manifest}, indent=1).encode()).decode()
