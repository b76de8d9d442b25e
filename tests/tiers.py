"""Which cases of a parametrized test belong to which tier; see CONTRIBUTING."""

from collections.abc import Iterable
from typing import Any

import pytest


def fast(cases: Iterable[Any], *some: Any) -> list[Any]:
    """These cases, all but some of them slow."""
    return [case if case in some else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def slow(cases: Iterable[Any], *some: Any) -> list[Any]:
    """These cases, some of them slow and the others of the full tier."""
    return [pytest.param(case, marks=pytest.mark.slow if case in some else pytest.mark.full) for case in cases]
