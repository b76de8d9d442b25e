"""Metrics of generated texts against the libraries' scores of whole corpora."""

import math
import random
from itertools import pairwise

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF
from torch.testing import assert_close

from fedlora.tasks.answers import exact_match, gsm8k, normal_form, squad
from fedlora.tasks.text_metrics import TEXT_METRICS

WORDS = ["the", "a", "cat", "Cats", "sat", "mat,", "running", "runs", "quickly", "(red)", "naïve", "1,000", "3.5", "is."]
HYPOTHESES = ["the cat is on the mat", "a dog runs", "hello there general kenobi"]
REFERENCES = [
    ["the cat sat on the mat", "there is a cat on the mat"],
    ["the dog runs fast", "a dog is running"],
    ["hello there", "hi general"],
]


def corpus(examples: int) -> tuple[list[str], list[list[str]]]:
    """Random texts, some of them empty, with one to three references each."""
    rng = random.Random(examples)

    def text(shortest: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(shortest, 9)))

    return [text(0) for _ in range(examples)], [[text(1) for _ in range(rng.randint(1, 3))] for _ in range(examples)]


def value(name: str, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    metric = TEXT_METRICS[name]
    return metric.metrics(metric.statistics(predictions, references).sum(0), len(predictions))


def library_scores(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """The scores of the whole corpus by sacrebleu and rouge-score."""
    columns = [[wanted[i] if i < len(wanted) else None for wanted in references] for i in range(3)]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    each = [scorer.score_multi(wanted, text) for text, wanted in zip(predictions, references, strict=True)]
    return {
        "bleu": BLEU().corpus_score(predictions, columns).score,
        "chrf": CHRF().corpus_score(predictions, columns).score,
        **{name: 100 * sum(one[name].fmeasure for one in each) / len(each) for name in each[0]},
    }


def test_sums_of_uneven_shards_give_the_libraries_scores_of_the_whole_corpus():
    predictions, references = corpus(170)
    bounds = [0, *sorted(random.Random(0).sample(range(1, 170), 16)), 170]
    found = {}
    for name in ("bleu", "chrf", "rouge"):
        metric = TEXT_METRICS[name]
        shards = [metric.statistics(predictions[a:b], references[a:b]).sum(0) for a, b in pairwise(bounds)]
        assert len(shards) == 17
        found.update(metric.metrics(torch.stack(shards).sum(0), 170))
    assert found == pytest.approx(library_scores(predictions, references), rel=1e-12)


def test_corpus_scores_are_not_means_over_the_examples():
    predictions, references = corpus(20)
    each = [value("bleu", [text], [wanted])["bleu"] for text, wanted in zip(predictions, references, strict=True)]
    assert abs(value("bleu", predictions, references)["bleu"] - sum(each) / 20) > 1


def test_bleu_counts_lengths_matches_and_totals_of_the_closest_references():
    sums = TEXT_METRICS["bleu"].statistics(HYPOTHESES, REFERENCES).sum(0)
    assert sums.tolist() == [13, 12, 12, 6, 1, 0, 13, 10, 7, 4]
    assert TEXT_METRICS["bleu"].metrics(sums, 3)["bleu"] == pytest.approx(31.5355, abs=5e-5)
    assert value("chrf", HYPOTHESES, REFERENCES)["chrf"] == pytest.approx(59.6642, abs=5e-5)
    assert TEXT_METRICS["bleu"].signature().startswith("nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert TEXT_METRICS["chrf"].signature().startswith("nrefs:var|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")


@pytest.mark.parametrize(
    ("reference", "prediction", "wanted"),
    [
        (
            "The quick brown foxes jumped over the lazy dogs.",
            "the quick brown fox jumps over a lazy dog",
            (8 / 9, 3 / 4, 8 / 9),
        ),
        ("police killed the gunman", "the gunman kill police", (1, 1 / 3, 1 / 2)),
        ("naïve", "na ve", (1, 1, 1)),  # other letters separate words
        ("police", "", (0, 0, 0)),
    ],
)
def test_rouge_is_the_f1_of_stemmed_words_and_takes_the_best_reference(reference, prediction, wanted):
    scores = torch.tensor([wanted], dtype=torch.float64)
    assert_close(TEXT_METRICS["rouge"].statistics([prediction], [[reference]]), scores)
    assert_close(TEXT_METRICS["rouge"].statistics([prediction], [["unrelated", reference, "other"]]), scores)


def test_exact_match_ignores_only_white_space_at_the_ends():
    assert exact_match(" Yes\n", ["no", "Yes"]) == (1,)
    assert exact_match("yes", ["Yes", "y es"]) == (0,)


def test_squad_compares_words_without_case_punctuation_and_articles():
    assert normal_form("  The Cat's\tan (old)  hat; theatre ") == "cats old hat theatre"
    assert squad("An  apple, red.", ["a pear", "the Apple red"]) == (1, 1)
    assert squad("red red apple", ["red apple pie", "plum"]) == (0, 2 / 3)  # 2 of 3 words, in both
    assert squad("the", ["a"]) == squad("", [""]) == (1, 1)
    assert squad("", ["apple"]) == squad("apple", ["the"]) == (0, 0)


@pytest.mark.parametrize(
    ("prediction", "strict", "flexible"),
    [
        ("6 * 3 = 18\n#### 18", 1, 1),
        ("#### 7\nno: #### $18.00 dollars, not 20", 1, 1),
        ("so there are 18 apples.", 0, 1),
        ("18 apples and 2 pears", 0, 0),
        ("#### 17, from 18", 0, 0),
        ("18 ####", 0, 1),
        ("#### -18", 0, 0),
        ("none", 0, 0),
        ("", 0, 0),
    ],
)
def test_gsm8k_takes_the_number_after_the_last_mark_or_else_the_last_number(prediction, strict, flexible):
    assert gsm8k(prediction, ["3 * 6 = <<3*6=18>>18\n#### 18"]) == (strict, flexible)


def test_gsm8k_compares_numbers_exactly():
    assert gsm8k("#### $1,234,567.50", ["#### 1234567.5"]) == (1, 1)
    assert gsm8k("#### -$5", ["7", "-5"]) == (1, 1)
    assert float("0.1") == float("0.10000000000000001")
    assert gsm8k("#### 0.1", ["#### 0.10000000000000001"]) == (0, 0)
    assert gsm8k(f"#### {'9' * 5000}", [f"#### {'9' * 4999}8"]) == (0, 0)


def test_gsm8k_never_matches_a_reference_without_a_number():
    assert gsm8k("no number", ["none"]) == (0, 0)
    assert gsm8k("7", ["none", "#### 7"]) == (0, 1)


@pytest.mark.parametrize("name", sorted(TEXT_METRICS))
def test_statistics_have_one_shape_and_type_and_undefined_metrics_are_nan(name):
    metric = TEXT_METRICS[name]
    none, some, empty = (
        metric.statistics([], []),
        metric.statistics(["3 cats"], [["cats 3"]]),
        metric.statistics([""], [["4"]]),
    )
    assert none.shape[1:] == some.shape[1:] == empty.shape[1:] and none.dtype == some.dtype == empty.dtype
    assert none.dtype in (torch.int64, torch.float64)
    assert all(map(math.isnan, metric.metrics(none.sum(0), 0).values()))
    assert set(metric.metrics(empty.sum(0), 1).values()) == {0}


@pytest.mark.parametrize("name", sorted(TEXT_METRICS))
def test_a_perfect_answer_has_a_hundred_and_impossible_sums_are_rejected(name):
    metric, text = TEXT_METRICS[name], "the answer to this question is: #### 42"
    perfect = metric.statistics([text], [["another", text]]).sum(0)
    assert list(metric.metrics(perfect, 1).values()) == pytest.approx([100] * len(metric.metrics(perfect, 1)))
    assert metric.check(perfect, 1) is None and metric.check(torch.zeros_like(perfect), 0) is None
    perfect[2 if name == "bleu" else -1] += 1  # matches of single words; of six letters; a score
    assert "exceed" in metric.check(perfect, 1)
