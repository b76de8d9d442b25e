"""Prompts with reference answers, for evaluation by generated text."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Question:
    """A prompt, as token ids, and its reference answers."""

    prompt: Int[Tensor, " tokens"]
    references: tuple[str, ...]


def grouped(questions: Iterable[Question]) -> list[Question]:
    """Each prompt once, with all of its references, in the order of first occurrence."""
    found: dict[tuple[int, ...], Question] = {}
    for one in questions:
        key = tuple(one.prompt.tolist())
        before = found[key].references if key in found else ()
        found[key] = Question(one.prompt, (*before, *one.references))
    return list(found.values())


def spread(questions: Sequence[Question], count: int) -> list[Question]:
    """At most `count` questions at equal distances, so that those of an ordered data set are represented."""
    if count >= len(questions):
        return list(questions)
    return [questions[i * len(questions) // count] for i in range(count)]
