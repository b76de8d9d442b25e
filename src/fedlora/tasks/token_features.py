"""Features of texts from those of their tokens."""

from jaxtyping import Float, Shaped
from torch import Tensor


def mean_of_tokens(
    hidden: Float[Tensor, "rows longest width"], inside: Shaped[Tensor, "rows longest"]
) -> Float[Tensor, "rows width"]:
    """The mean of each row's tokens in fp32, where `inside` is 1 or true."""
    hidden, inside = hidden.float(), inside[..., None].float()
    mean: Tensor = (hidden * inside).sum(1) / inside.sum(1)
    return mean
