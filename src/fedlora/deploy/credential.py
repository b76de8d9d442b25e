"""Credential of a node."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Credential:
    """Name of a node's key, and the clients declared for it: the only ones that the node may register."""

    name: str
    clients: frozenset[str]
