"""Lets tests import the helpers that stand beside them, and keeps their cache away from the user's."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """One folder for all processes of a test run."""
    base = tmp_path_factory.getbasetemp()
    os.environ["FEDLORA_CACHE"] = str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache")
