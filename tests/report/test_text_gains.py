"""Answers before and after training, and the intervals of their gains."""

import json
import random

import numpy as np
import pytest
from scipy import stats

from fedlora.report.text_gains import Answers, before_and_after, gain
from fedlora.tasks.text_metrics import TEXT_METRICS


def write(run, number, answers):
    """The samples of a round, given the answer to each prompt."""
    (run / "samples").mkdir(exist_ok=True)
    rows = [{"prompt": p, "answer": a, "references": [f"the {p}", p]} for p, a in answers.items()]
    (run / "samples" / f"round-{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_answers_of_the_first_and_the_last_evaluation_are_paired_by_prompt(tmp_path):
    write(tmp_path, 10, {"b": "4", "a": "3"})
    write(tmp_path, 2, {"a": "?", "b": "?"})
    write(tmp_path, 0, {"a": "1", "b": "2"})
    assert before_and_after(tmp_path) == [Answers("a", ["the a", "a"], "1", "3"), Answers("b", ["the b", "b"], "2", "4")]


def test_a_run_with_fewer_than_two_evaluations_has_no_pairs(tmp_path):
    assert before_and_after(tmp_path) == []
    write(tmp_path, 3, {"a": "1"})
    assert before_and_after(tmp_path) == []


def test_answers_to_other_prompts_are_rejected(tmp_path):
    write(tmp_path, 0, {"a": "1"})
    write(tmp_path, 1, {"b": "1"})
    with pytest.raises(ValueError, match="different prompts"):
        before_and_after(tmp_path)


def made_up(count=40):
    words, rng = ["one", "two", "three", "four", "five"], random.Random(0)
    texts = [[" ".join(rng.choices(words, k=5)) for _ in range(count)] for _ in range(2)]
    return [Answers(str(i), [a], b, rng.choice([a, a, b])) for i, (a, b) in enumerate(zip(*texts, strict=True))]


def test_of_a_mean_of_scores_the_interval_is_scipys_percentile_bootstrap_of_the_paired_differences():
    answers, metric = made_up(), TEXT_METRICS["rouge"]
    references = [one.references for one in answers]
    before, after = (
        100 * metric.statistics(texts, references)[:, 2].numpy()
        for texts in ([one.before for one in answers], [one.after for one in answers])
    )
    found = gain(metric, "rougeL", answers)
    options = {"method": "percentile", "n_resamples": 5000, "rng": 1}
    expected = stats.bootstrap((after - before,), np.mean, **options).confidence_interval
    assert (found.before, found.after) == pytest.approx((before.mean(), after.mean()))
    assert (found.interval.low, found.interval.high) == pytest.approx((expected.low, expected.high), abs=1.0)


def test_a_corpus_score_is_computed_anew_of_each_resample():
    answers, metric, rng = made_up(20), TEXT_METRICS["bleu"], random.Random(1)

    def bleu(which, drawn):
        texts, references = [getattr(one, which) for one in drawn], [one.references for one in drawn]
        return metric.metrics(metric.statistics(texts, references).sum(0), len(drawn))["bleu"]

    draws = [rng.choices(answers, k=20) for _ in range(400)]
    plain = np.quantile([bleu("after", drawn) - bleu("before", drawn) for drawn in draws], (0.025, 0.975))
    found = gain(metric, "bleu", answers)
    assert (found.before, found.after) == pytest.approx((bleu("before", answers), bleu("after", answers)))
    assert (found.interval.low, found.interval.high) == pytest.approx(tuple(plain), abs=6.0)


def test_equal_answers_gain_nothing():
    found = gain(TEXT_METRICS["rouge"], "rougeL", [Answers("p", ["a b"], "a c", "a c")] * 3)
    assert (found.interval.low, found.interval.high) == (0, 0) and not found.interval.excludes_zero
