"""Sums of the clipped gradients of single examples."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedlora.linalg.token_products import TokenProducts
from fedlora.models.example_gradients import ExampleGradient

_TINY = 1e-6


def add_clipped(
    sums: Mapping[str, Float[Tensor, "clients ..."]],
    each: Mapping[str, ExampleGradient],
    places: Int[Tensor, " examples"],
    clips: Float[Tensor, " clients"],
) -> None:
    """Adds each example's gradient to the sum of its client, scaled down to the client's clip.

    The scale is min(1, clip / (norm + 1e-6)), with the L2 norm over all tensors of `each` together. An example whose norm
    is not finite adds 0. `places` are the places of the examples' clients.
    """
    if not each:
        return
    flat = {key: x if isinstance(x, TokenProducts) else x.flatten(1) for key, x in each.items()}
    norms = torch.stack([_norms(x) for x in flat.values()]).norm(dim=0)  # [examples]
    finite = norms.isfinite()
    scales = (clips[places] / (norms + _TINY)).clamp(max=1).where(finite, 0)
    weights = torch.zeros(len(clips), len(places), dtype=norms.dtype, device=norms.device)
    weights[places, torch.arange(len(places), device=places.device)] = scales
    all_finite, own_rows = bool(finite.all()), [own.nonzero()[:, 0] for own in weights]
    for key, x in flat.items():
        if isinstance(x, TokenProducts):
            for place, own in enumerate(own_rows):
                if len(own):
                    sums[key][place].add_(x.select(own).weighted_sum(scales[own]))
        else:
            x = x if all_finite else x.where(finite[:, None], 0)
            sums[key].add_((weights @ x).view(sums[key].shape))


def _norms(x: ExampleGradient) -> Float[Tensor, " examples"]:
    return x.norms() if isinstance(x, TokenProducts) else torch.linalg.vector_norm(x, dim=1)


def example_passes(lengths: Sequence[int], max_tokens: int, max_examples: int) -> list[list[int]]:
    """Indices of the examples of each pass, sorted by length.

    A pass has at most `max_tokens` tokens, padding included, or `max_examples` examples, or a part of each that together
    are one: its memory is that of activations and of gradients. It has at least one example.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda place: lengths[place]):
        count = len(groups[-1]) + 1 if groups else 1
        if not groups or count * (lengths[i] / max_tokens + 1 / max_examples) > 1:
            groups.append([])
        groups[-1].append(i)
    return groups
