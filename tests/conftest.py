"""Lets tests import the helpers that stand beside them, and keeps their cache away from the user's.

What takes long to import comes first: from within a module whose types are checked, Python would not find it compiled.
"""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

import beartype  # noqa: F401
import datasets  # noqa: F401
import peft  # noqa: F401
import pytest

with suppress(ImportError):
    import flwr.superlink.main  # noqa: F401

sys.path.insert(0, str(Path(__file__).parent))

collect_ignore_glob = ["*conftest.py"]  # modules of one name, which doctest cannot all import


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """One folder for all processes of a test run."""
    base = tmp_path_factory.getbasetemp()
    os.environ["FEDLORA_CACHE"] = str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Makes a finished run of a tiny model, see `Trained`, or gives the one made before."""
    from trained import Trained

    home, made = tmp_path_factory.mktemp("trained"), {}

    def make(kind, method="fedit", **tables):
        key = json.dumps([kind, method, tables])
        if key not in made:
            made[key] = Trained(home / f"{len(made)}", kind, method, **tables)
        return made[key]

    return make
