"""Values that successive runs of one process reuse."""

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Reuse:
    """The last value of each kind, by the settings on which it depends. Users must not change a value."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[str, Any]] = {}

    def get(self, kind: str, key: str, make: Callable[[], T]) -> T:
        """The value of `make()`, which is called only if the last value of this kind had another key."""
        if kind not in self._last or self._last[kind][0] != key:
            self._last.pop(kind, None)  # two values of a kind are never in memory together
            self._last[kind] = key, make()
        found: T = self._last[kind][1]
        return found
