"""What a node's key stands for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Credential:
    """A node's key under its name, and the clients that it was declared for: the only ones that the node may bring."""

    name: str
    clients: frozenset[str]
