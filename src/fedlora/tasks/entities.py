"""Entities in sequences of tags, and counts of those that were predicted."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional

OUTSIDE = "O"
_ENTITY = re.compile(r"([BIELSU])-(.+)")


@dataclass(frozen=True)
class Scheme:
    """Tags of entities as BIO, or with E- or L- for the last word and S- or U- for the only one.

    An entity extends over consecutive words with tags of one type, until a tag that begins another one, or after a tag
    that ends it. Thus an I- without an entity before it begins one, as in conlleval.
    """

    types: tuple[str, ...]
    type_of: tuple[int, ...]
    """The index of each tag's type, -1 for O; the last entry, also -1, is for words without a tag."""
    begins: tuple[bool, ...]
    ends: tuple[bool, ...]

    def counts(
        self, gold: Int[Tensor, "rows words"], predicted: Int[Tensor, "rows words"]
    ) -> Int[Tensor, "rows types kinds"]:
        """The numbers of correct, predicted and gold entities of each type; words without a tag have the number of tags.

        An entity is correct if its first word, last word and type are.
        """
        found = [self._entities(tags) for tags in (gold, predicted)]
        (types, begins, ends), (guessed, guessed_begins, guessed_ends) = found
        right = begins & guessed_begins & (types == guessed) & (ends == guessed_ends)
        kinds = ((right, types), (guessed_begins, guessed), (begins, types))
        return torch.stack([self._of_each_type(which, of) for which, of in kinds], -1)

    def _entities(
        self, tags: Int[Tensor, "rows words"]
    ) -> tuple[Int[Tensor, "rows words"], Bool[Tensor, "rows words"], Int[Tensor, "rows words"]]:
        """For each word its type, whether an entity begins at it, and where an entity that contains it ends."""
        types, begin, end = (torch.tensor(x, device=tags.device) for x in (self.type_of, self.begins, self.ends))
        before = functional.pad(tags[:, :-1], (1, 0), value=len(self.type_of) - 1)
        begins = (types[tags] >= 0) & (begin[tags] | end[before] | (types[before] != types[tags]))
        words = tags.shape[1]
        stops = torch.where(begins | (types[tags] < 0), torch.arange(words, device=tags.device), words)
        next_stop = stops.flip(1).cummin(1).values.flip(1)  # at this word or later
        return types[tags], begins, functional.pad(next_stop[:, 1:], (0, 1), value=words)

    def _of_each_type(
        self, which: Bool[Tensor, "rows words"], types: Int[Tensor, "rows words"]
    ) -> Int[Tensor, "rows types"]:
        empty = torch.zeros(len(which), len(self.types), dtype=torch.long, device=which.device)
        return empty.scatter_add(1, types.clamp(min=0), which.long())


@cache
def scheme(tags: tuple[str, ...]) -> Scheme | None:
    """The scheme of these tags; None if they do not mark entities, as those of parts of speech."""
    found = [_ENTITY.fullmatch(tag) for tag in tags]
    if not any(found) or any(match is None and tag != OUTSIDE for tag, match in zip(tags, found, strict=True)):
        return None
    types = tuple(sorted({match[2] for match in found if match}))
    parts = [(match[1], types.index(match[2])) if match else ("", -1) for match in found] + [("", -1)]
    return Scheme(
        types,
        tuple(type_ for _, type_ in parts),
        tuple(prefix in ("B", "S", "U") for prefix, _ in parts),
        tuple(prefix in ("E", "L", "S", "U") for prefix, _ in parts),
    )


def inner(tags: Sequence[str]) -> list[int]:
    """For each tag that of the other tokens of a word: for B- the I- of its type if there is one, else the same tag."""
    index = {tag: i for i, tag in enumerate(tags)}
    return [index.get(f"I-{tag[2:]}", i) if tag.startswith("B-") else i for i, tag in enumerate(tags)]
