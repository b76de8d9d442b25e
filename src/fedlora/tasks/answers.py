"""Agreement of an answer with reference answers, in [0, 1]; of several references, the best counts."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_MARK = "####"
"""Mark before the final number in GSM8K's answers."""


def exact_match(prediction: str, references: Sequence[str]) -> tuple[float]:
    """Whether the prediction is a reference, apart from white space at both ends."""
    return (float(prediction.strip() in {text.strip() for text in references}),)


def squad(prediction: str, references: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1 of words in SQuAD's normal form; an empty text matches an empty reference only.

    Source: the evaluation script of SQuAD 2.0; Rajpurkar et al. 2018, arXiv:1806.03822.
    """
    found, wanted = normal_form(prediction).split(), [normal_form(text).split() for text in references]
    return float(found in wanted), max(_f1(found, words) for words in wanted)


def gsm8k(prediction: str, references: Sequence[str]) -> tuple[float, float]:
    """Whether the final number is that of a reference: strict (it follows a `####`), and flexible (or is the last one).

    Numbers are compared exactly; dollar signs and thousands separators are ignored. A reference without a number is never
    matched.
    Source: Cobbe et al. 2021, arXiv:2110.14168.
    """
    wanted = {_final_number(text) for text in references} - {None}
    return float(_marked_number(prediction) in wanted), float(_final_number(prediction) in wanted)


def normal_form(text: str) -> str:
    """SQuAD's normal form: lower case, without ASCII punctuation and the articles a, an, the; single blanks."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def _f1(found: list[str], wanted: list[str]) -> float:
    """F1 of two multisets of words."""
    if not found or not wanted:
        return float(found == wanted)
    return 2 * (Counter(found) & Counter(wanted)).total() / (len(found) + len(wanted))


def _marked_number(text: str) -> Decimal | None:
    """The first number after the last mark."""
    _, mark, rest = text.rpartition(_MARK)
    found = _NUMBER.search(rest) if mark else None
    return _number(found.group()) if found else None


def _final_number(text: str) -> Decimal | None:
    """The marked number, else the last number."""
    if (marked := _marked_number(text)) is not None:
        return marked
    numbers = _NUMBER.findall(text)
    return _number(numbers[-1]) if numbers else None


def _number(text: str) -> Decimal:
    return Decimal(text.replace("$", "").replace(",", ""))
