"""Passages of text joined and cut into blocks of equal length."""

from collections.abc import Hashable, Mapping
from dataclasses import replace
from itertools import accumulate
from typing import TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from fedlora.tasks.task import NO_TARGET, Examples

K = TypeVar("K", bound=Hashable)


def cut_into_blocks(examples: Examples, rows: Mapping[K, Int[Tensor, " _"]]) -> tuple[Examples, dict[K, Int[Tensor, " _"]]]:
    """The examples of each group, one after the other, as blocks of `block_length` tokens, the last one shorter; and the
    rows of each group's blocks.

    Every token of a block is a target, but for the first. A last block of one token, which has no target, is left out.
    """
    length = examples.block_length
    assert length is not None
    places: list[Tensor] = []
    sizes: list[int] = []
    blocks: dict[K, Tensor] = {}
    for group, own in rows.items():
        flat = torch.cat(
            [torch.arange(0), *(torch.arange(*examples.starts[row : row + 2].tolist()) for row in own.tolist())]
        )
        cut = [part for part in torch.split(flat, length) if len(part) > 1]
        blocks[group] = torch.arange(len(sizes), len(sizes) + len(cut))
        places += cut
        sizes += map(len, cut)
    at = torch.cat([torch.arange(0), *places])
    bounds = torch.tensor([0, *accumulate(sizes)])
    targets = examples.features["input_ids"][at].roll(-1)
    targets[bounds[1:] - 1] = NO_TARGET
    features = {name: x[at] for name, x in examples.features.items()}
    return replace(
        examples, features=features, starts=bounds, targets=targets, target_starts=bounds, block_length=None
    ), blocks
