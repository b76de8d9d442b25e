"""The parameters of a client's private training."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RecordPrivacy:
    """One client's DP-SGD: each example is in a step's sample with probability `rate`, the norms of the examples' gradients
    are at most `clip`, and the noise has the standard deviation `noise_multiplier` * `clip`.

    `steps` is the largest number of steps in the whole run, which was promised. The expected batch, by which the sum is
    divided, is `rate` times the number of the client's examples, which counts as public.
    """

    clip: float
    noise_multiplier: float
    rate: float
    steps: int
