"""Credentials of nodes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Credential:
    """Name of a node's key, and the key's clients, which are the only ones that the node may register."""

    name: str
    clients: frozenset[str]
