"""Keeps the privacy ledgers of the tests' nodes away from the user's, and from those of other tests."""

import pytest


@pytest.fixture(autouse=True)
def _own_ledgers(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
