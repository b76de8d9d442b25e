"""Predictions of runs, exported adapters and merged models."""

import statistics

import pytest

from fedlora import UserError, evaluate, predict
from fedlora.tasks.table import tasks
from fedlora.tasks.text_metrics import TEXT_METRICS

QUICK = ("classification", "causal-lm", "tagging")
KINDS = [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in tasks()]


def scored(kind, found, rows):
    """A metric of these predictions, by the tasks' definitions, and its name."""
    match kind:
        case "classification":
            return "accuracy", statistics.mean(one["label"] == row["label"] for one, row in zip(found, rows, strict=True))
        case "regression":
            return "mse", statistics.mean((one["score"] - row["label"]) ** 2 for one, row in zip(found, rows, strict=True))
        case "tagging":
            tags = [
                (a, b) for one, row in zip(found, rows, strict=True) for a, b in zip(one["tags"], row["tags"], strict=True)
            ]
            return "accuracy", statistics.mean(a == b for a, b in tags)
        case "multiple-choice":
            assert all(row["options"][one["index"]] == one["option"] for one, row in zip(found, rows, strict=True))
            return "acc_norm", statistics.mean(one["option"] == row["answer"] for one, row in zip(found, rows, strict=True))
    answers, references = [one["answer"] for one in found], [[row["response"]] for row in rows]
    metric = TEXT_METRICS["rouge"]
    return "rougeL", metric.metrics(metric.statistics(answers, references).sum(0), len(rows))["rougeL"]


@pytest.mark.parametrize("kind", [one for one in KINDS if one.values != ("image-classification",)])
def test_predictions_have_the_score_of_an_evaluation_and_need_no_targets(kind, trained):
    one = trained(kind)
    rows = one.rows
    found = predict(one.run, one.data)
    name, value = scored(kind, found, rows)
    with_answers = ["evaluate.generate=1000"] if "answer" in found[0] else []
    assert value == pytest.approx(evaluate(one.run, one.data, overrides=with_answers)[name], rel=1e-5)
    targets = ("label", "tags", "answer", "response")
    bare = [{key: x for key, x in row.items() if key not in targets} for row in rows]
    for row in bare:
        if kind == "causal-lm":
            row["messages"] = row["messages"][:-1]
    assert predict(one.run, bare) == found


@pytest.mark.slow
def test_images_are_predicted_with_the_accuracy_of_an_evaluation(trained):
    one = trained("image-classification")
    import numpy as np

    labels = np.load(one.data)["label"]
    found = predict(one.run, one.data)
    accuracy = statistics.mean(str(label) == each["label"] for label, each in zip(labels, found, strict=True))
    assert accuracy == pytest.approx(evaluate(one.run, one.data)["accuracy"])


@pytest.mark.parametrize("kind", [one for one in KINDS if one.values != ("image-classification",)])
def test_a_run_its_adapter_and_its_merged_model_predict_the_same(kind, trained):
    one = trained(kind)
    (given, *_) = zip(*(predict(path, one.data) for path in (one.run, one.adapter, one.merged)), strict=True)
    run, adapter, merged = given
    for name in run:
        assert adapter[name] == merged[name] == run[name] or adapter[name] == pytest.approx(run[name], rel=1e-3)


def test_a_text_is_a_row_and_its_probability_is_that_of_its_label(trained):
    one = trained("classification")
    rows = one.rows[:3]
    found = predict(one.run, [row["text"] for row in rows])
    assert found == [pytest.approx(each) for each in predict(one.run, rows)]
    assert all(1 / 3 <= each["probability"] <= 1 for each in found)


def test_a_text_is_split_into_words_or_is_a_message_of_the_user(trained):
    (tagged,) = predict(trained("tagging").run, ["bab bad baf bak"])
    assert len(tagged["tags"]) == 4
    one = trained("causal-lm")
    found = predict(one.run, ["bab bad"])
    assert found == predict(one.run, [{"messages": [{"role": "user", "content": "bab bad"}]}])


@pytest.mark.slow
def test_single_texts_are_rejected_by_a_task_that_reads_several_columns(trained):
    with pytest.raises(UserError, match="rows with the columns prompt, options, which the task reads, found single texts"):
        predict(trained("multiple-choice").run, ["bab"])


def test_words_beyond_the_maximum_length_have_no_tag(trained):
    (tagged,) = predict(trained("tagging").run, ["bab bad baf bak bal"], overrides=["train.max_length=4"])
    assert None not in tagged["tags"][:2] and tagged["tags"][2:] == [None] * 3
    (none,) = predict(trained("tagging").run, ["bab bad baf bak bal"], overrides=["train.max_length=2"])
    assert none["tags"] == [None] * 5


def test_prompts_that_fill_the_maximum_length_are_reported(trained):
    notes = []
    predict(trained("causal-lm").run, ["bab", "bab bad baf bak"], overrides=["train.max_length=6"], notify=notes.append)
    assert notes == ["train.max_length = 6: 2 of 2 prompts are that long, or truncated to it"]
