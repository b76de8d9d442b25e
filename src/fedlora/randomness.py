"""Seeds derived from names, so that results do not depend on order, batching or resumption."""

import hashlib

import torch


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed that depends on `seed` and on every name, and on nothing else (not on the machine, not on time)."""
    text = "\x1f".join([str(seed), *(f"{type(name).__name__}:{name}" for name in names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator seeded with `derive(seed, *names)`."""
    return torch.Generator().manual_seed(derive(seed, *names))
