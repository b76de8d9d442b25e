"""Client sampling."""

from collections.abc import Sequence

import torch

from fedlora.errors import UserError
from fedlora.messages import ClientInfo, Round


def choose(clients: Sequence[ClientInfo], fraction: float, rnd: Round) -> list[ClientInfo]:
    """Samples `cohort_size` clients uniformly without replacement; returns them in order of their ids.

    The choice depends on the run's seed, the round and the attempt, not on the order of `clients`.
    """
    ordered = sorted(clients, key=lambda client: client.id)
    wanted = cohort_size(len(ordered), fraction)
    rng = rnd.rng(f"sample {rnd.attempt}")
    return [ordered[i] for i in sorted(torch.randperm(len(ordered), generator=rng)[:wanted].tolist())]


def cohort_size(clients: int, fraction: float) -> int:
    """Number of clients in a round: at least one."""
    return max(1, round(fraction * clients))


def check_cohort(clients: int, fraction: float, min_replies: int) -> None:
    """Checks that this number of clients is sufficient for a round, by `sampling.fraction` and `sampling.min_replies`.

    Raises:
        UserError: the cohort is smaller than the minimum number of replies.
    """
    if (cohort := cohort_size(clients, fraction)) < min_replies:
        raise UserError(
            f"sampling.min_replies = {min_replies}: only {cohort} of {clients} clients are chosen for a round; "
            "lower it, or raise sampling.fraction"
        )
