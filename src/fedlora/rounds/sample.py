"""Who takes part in a round."""

from collections.abc import Sequence

import torch

from fedlora.messages import ClientInfo, Round


def choose(clients: Sequence[ClientInfo], fraction: float, rnd: Round) -> list[ClientInfo]:
    """max(1, round(fraction * clients)) of them, uniformly without replacement, in order of their ids.

    The choice depends on the run's seed, the round and the attempt, not on the order of `clients`.
    """
    ordered = sorted(clients, key=lambda who: who.id)
    wanted = max(1, round(fraction * len(ordered)))
    rng = rnd.rng(f"sample {rnd.attempt}")
    return [ordered[i] for i in sorted(torch.randperm(len(ordered), generator=rng)[:wanted].tolist())]
