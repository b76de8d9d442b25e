"""Metrics of predicted tokens from sums."""

import math
from collections.abc import Mapping

from torch import Tensor


def token_metrics(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean loss of a target, its exponential, and the fraction of targets that are predicted; NaN for no targets.

    `sums` has the sum of the losses, and the numbers of targets (`tokens`) and of right predictions (`right`).
    """
    loss, tokens, right = (float(sums[name]) for name in ("loss", "tokens", "right"))
    mean = loss / tokens if tokens else math.nan
    return {
        "loss": mean,
        "perplexity": math.exp(mean) if mean < 700 else math.inf if mean >= 700 else math.nan,
        "token_accuracy": right / tokens if tokens else math.nan,
    }
