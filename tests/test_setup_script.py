"""scripts/setup, with a Python that only pretends to install."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "setup"
PYTHON = """#!/bin/sh
case "$*" in
"-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
*--require-hashes*) [ -z "$ERRORS" ] || { echo "WARNING: Retrying"; echo "$ERRORS"; echo "more"; exit 1; } >&2 ;;
esac
"""


@pytest.mark.parametrize(
    ("errors", "code", "stamped", "parts"),
    [
        ("", 0, True, []),
        ("ERROR: No matching distribution found", 0, False, ["could not be installed: ERROR: No matching", "skipped"]),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES", 1, False, ["expected sha256:", "ERROR: THESE PACKAGES"]),
    ],
)
def test_a_model_that_cannot_be_fetched_is_fetched_by_the_next_set_up_and_a_wrong_hash_fails(
    errors, code, stamped, parts, tmp_path
):
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPT, tmp_path / "scripts" / "setup")
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "ERRORS": errors}
    ended = subprocess.run(
        [tmp_path / "scripts" / "setup"], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert ended.returncode == code
    assert (tmp_path / ".venv" / ".installed").exists() == stamped
    first, *shown = ended.stderr.splitlines()
    assert first.startswith("setting up") and len(shown) == bool(parts)
    assert all(part in shown[0] for part in parts)
