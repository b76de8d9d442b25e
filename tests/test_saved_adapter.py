"""Evaluation of runs, exported adapters and merged models."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers

from fedlora import UserError, evaluate, predict
from fedlora.runs.lock import FolderLock
from fedlora.tasks.table import tasks

from tiny import LABELS

QUICK = ("classification", "causal-lm", "tagging")
KINDS = [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in tasks()]


def close(metrics):
    return pytest.approx(metrics, rel=1e-4, abs=1e-6, nan_ok=True)


def same(metrics):
    return pytest.approx(metrics, rel=0, abs=0, nan_ok=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_scores_of_a_run_on_its_own_test_set_are_those_of_its_last_row(kind, trained):
    one = trained(kind)
    assert evaluate(one.run) == same(one.result.rows[-1].global_)


@pytest.mark.parametrize(
    ("method", "evaluation"), [("frlora", {}), ("full-ft", {}), ("fedit", {"stop_after": 1, "metric": "clients.loss.mean"})]
)
def test_the_scores_include_base_updates_and_are_those_of_the_best_round(method, evaluation, trained):
    one = trained("classification", method, evaluate=evaluation, train={"lr": 0.3, "max_length": 32, "device": "cpu"})
    best = one.result.best_round
    (row,) = [row for row in one.result.rows if row.round == (one.result.rows[-1].round if best is None else best)]
    assert (best is None) == (not evaluation)
    assert evaluate(one.run) == same(row.global_)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_its_adapter_and_its_merged_model_have_the_same_scores_on_a_file(kind, trained):
    one = trained(kind)
    found = [evaluate(path, one.data) for path in (one.run, one.adapter, one.merged)]
    assert found[0]["examples"] > 12
    for other in found[1:]:
        assert other == close({name: found[0][name] for name in other})


def test_rows_in_memory_have_the_scores_of_the_file(trained):
    one = trained("classification")
    assert evaluate(one.run, one.rows) == evaluate(one.run, one.data)


def test_answers_are_generated_on_request(trained):
    one = trained("causal-lm")
    found = evaluate(one.adapter, one.data, overrides=["evaluate.generate=3", "evaluate.max_new_tokens=4"])
    whole = evaluate(one.run, one.data, overrides=["evaluate.generate=3"])
    assert found.keys() == whole.keys() and found["rougeL"] == whole["rougeL"]


def test_another_column_is_read_on_request(trained):
    one = trained("classification")
    rows = [{"body": row["text"], "label": row["label"]} for row in one.rows]
    assert evaluate(one.run, rows, overrides=["data.text=body"]) == evaluate(one.run, one.data)


def test_a_client_of_a_personal_method_has_scores_of_its_own(trained):
    one = trained("classification", "local-only")
    client, other = sorted(one.result.adapters)
    found = evaluate(one.run, one.data, client=client)
    assert found == close(evaluate(one.result.adapters[client], one.data))
    assert found["loss"] != evaluate(one.run, one.data, client=other)["loss"]
    with pytest.raises(UserError, match="an adapter for each client: choose one with --client"):
        evaluate(one.run, one.data)
    with pytest.raises(UserError, match=f"'nobody': the run has no such client; available: '{client}'"):
        evaluate(one.run, one.data, client="nobody")


def test_a_run_that_another_process_has_locked_is_read_and_not_changed(trained, tmp_path):
    run = shutil.copytree(trained("classification").run, tmp_path / "run")
    with (run / "rounds.jsonl").open("a") as file:
        file.write('{"round": 3')  # of a round that is not complete
    lock = FolderLock(run, 0.0)
    try:
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        assert evaluate(run) == trained("classification").result.rows[-1].global_
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    finally:
        lock.release()


def test_an_adapter_made_by_peft_predicts_what_peft_computes(trained, tmp_path):
    base = str(trained("classification").run.parent / "bert")
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    config = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=2,
        lora_alpha=8,
        use_rslora=True,
        init_lora_weights=False,
        target_modules=["query", "dense"],
        exclude_modules=["pooler.dense", "classifier"],
        rank_pattern={"intermediate.dense": 3},
        alpha_pattern={"query": 5},
        modules_to_save=["classifier", "pooler"],
    )
    adapted = peft.get_peft_model(model, config).eval()
    adapted.save_pretrained(tmp_path)
    (tmp_path / "labels.json").write_text(json.dumps(LABELS))
    texts = ["bab bad baf", "ceb ced"]
    with torch.inference_mode():
        inputs = transformers.AutoTokenizer.from_pretrained(base)(texts, return_tensors="pt", padding=True)
        expected = adapted(**inputs).logits.softmax(-1)
    found = predict(tmp_path, texts, overrides=["task=classification"])
    assert [one["label"] for one in found] == [LABELS[i] for i in expected.argmax(-1)]
    assert [one["probability"] for one in found] == pytest.approx(expected.amax(-1).tolist(), rel=1e-4)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "bab", "label": "south"}], "row 1 has a label that is not among the 3 names of the labels"),
        ([{"body": "bab", "label": "west"}], r"has no column 'text' \(data.text\); available: 'body', 'label'"),
        ([{"text": "", "label": "west"}], r"column 'text' \(data.text\): row 1 is empty"),
        ("no-such.jsonl", "data = 'no-such.jsonl': no such file"),
        (7, "data .int.: expected the name of a file, a list of mappings"),
    ],
)
def test_data_that_cannot_be_used_are_rejected_in_one_line(rows, message, trained):
    with pytest.raises(UserError, match=message) as error:
        evaluate(trained("classification").run, rows)
    assert "\n" not in str(error.value) and "south" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr=1", "--set train.lr: cannot be changed here; allowed: data.answer"),
        ("task=regression", "--set task: cannot be changed here"),
        ("data.labels=['a']", "--set data.labels: cannot be changed here"),
        ("train.max_length=0", "train.max_length = 0"),
    ],
)
def test_settings_that_make_another_model_of_a_run_cannot_be_changed(override, message, trained):
    with pytest.raises(UserError, match=message):
        evaluate(trained("classification").run, overrides=[override])


def test_a_folder_without_task_or_labels_says_what_to_set(trained, tmp_path):
    for name, files in (("adapter", ["fedlora.toml", "labels.json"]), ("merged", ["fedlora.toml"])):
        folder = shutil.copytree(getattr(trained("classification"), name), tmp_path / name)
        for file in files:
            (folder / file).unlink()
        with pytest.raises(UserError, match=r"has no fedlora\.toml, which names the task; set the task and its columns"):
            predict(folder, ["bab"])
    with pytest.raises(UserError, match="has no names of labels; set them"):
        predict(tmp_path / "adapter", ["bab"], overrides=["task=classification"])
    (one,) = predict(tmp_path / "merged", ["bab"], overrides=["task=classification"])
    assert one["label"] in LABELS  # those in config.json


def test_what_is_no_trained_model_or_has_no_test_set_is_named(trained, tmp_path):
    with pytest.raises(UserError, match="expected a run directory, the folder of a PEFT adapter, or a model"):
        evaluate(tmp_path)
    with pytest.raises(UserError, match="has no test set of its own; name a file with --data"):
        evaluate(trained("classification").adapter)


def test_a_changed_test_set_is_not_taken_for_that_of_the_run(trained):
    one = trained("classification")
    file = Path(one.data)
    original = file.read_text()
    file.write_text(original.replace(" ", "  "))
    try:
        with pytest.raises(UserError, match="some of its 12 test examples have changed"):
            evaluate(one.run)
    finally:
        file.write_text(original)
