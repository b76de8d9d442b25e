"""Multiple choice by likelihoods of options."""

import json
import random
import re
from pathlib import Path

import peft
import pytest
import torch
import transformers

from fedlora.adapter import lora_init
from fedlora.api import export, resume, run
from fedlora.config.experiment import build
from fedlora.config.sections import Data
from fedlora.data.sources import load
from fedlora.errors import UserError
from fedlora.federated_data import FederatedData
from fedlora.messages import Statistics
from fedlora.rounds.plan import RunState
from fedlora.run_exports import write_exports
from fedlora.runs.folder import RunFolder
from fedlora.session import Session
from fedlora.tasks import token_losses
from fedlora.tasks.multiple_choice import MultipleChoice
from fedlora.tasks.task import NO_TARGET, Task
from fedlora.train.micro_batches import bytes_per_token
from tiny_lm import tiny_lm

from tiny import WORDS

TASK: Task = MultipleChoice()
CPU = torch.device("cpu")


def questions(count, seed=0):
    """Questions with two to four options of one to three words; the right one begins with the question's first word."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        prompt = rng.choices(WORDS[:12], k=rng.randint(1, 6))
        options = [[word, *rng.choices(WORDS, k=rng.randint(0, 2))] for word in rng.sample(WORDS[12:30], rng.randint(2, 4))]
        answer = rng.randrange(len(options))
        options[answer][0] = prompt[0]
        rows.append({"prompt": " ".join(prompt), "options": [" ".join(one) for one in options], "answer": answer})
    return rows


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with two models, training rows and test rows."""
    folder = tmp_path_factory.mktemp("choice")
    for kind in ("llama", "gpt2"):
        tiny_lm(folder / kind, kind)
    for name, count in (("train", 60), ("test", 20)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, questions(count, seed=count))))
    return folder


@pytest.fixture(scope="module")
def tokenizer(home):
    return transformers.AutoTokenizer.from_pretrained(home / "llama")


def columns(rows):
    return {name: [row[name] for row in rows] for name in ("prompt", "options", "answer")}


def likelihoods(model, tokenizer, row):
    """The log-likelihood of each option, one pass each, with gradients."""
    found = []
    for option in row["options"]:
        question, answer = (tokenizer(text)["input_ids"] for text in (row["prompt"], option))
        logits = model(input_ids=torch.tensor([question + answer])).logits[0].float().log_softmax(-1)
        found.append(sum(logits[len(question) - 1 + i, token] for i, token in enumerate(answer)))
    return torch.stack(found)


def scores(model, tokenizer, rows):
    """The metrics, from one pass for each option."""
    model.eval()
    with torch.inference_mode():
        each = [likelihoods(model, tokenizer, row) for row in rows]
    bytes_ = [torch.tensor([len(option.encode()) for option in row["options"]]) for row in rows]
    losses = [float(-one.log_softmax(0)[row["answer"]]) for one, row in zip(each, rows, strict=True)]
    return {
        "acc_norm": sum(
            int((one / size).argmax()) == row["answer"] for one, size, row in zip(each, bytes_, rows, strict=True)
        )
        / len(rows),
        "acc": sum(int(one.argmax()) == row["answer"] for one, row in zip(each, rows, strict=True)) / len(rows),
        "loss": sum(losses) / len(losses),
    }


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_scores_and_losses_are_those_of_one_pass_for_each_option(home, kind):
    model, tokenizer, _ = TASK.load(str(home / kind), (), 0)
    rows = questions(15, seed=2)
    inputs, targets = TASK.encode(tokenizer, columns(rows), 64).batch(torch.arange(15), CPU)
    with torch.inference_mode():
        found = TASK.measure(model.eval(), inputs, targets, torch.ones(1, 15, dtype=torch.bool))
        sums, counts = MultipleChoice("answer").losses(model, inputs, targets)
        each = [likelihoods(model, tokenizer, row)[row["answer"]] for row in rows]
    statistics = Statistics(15, {name: x[0] for name, x in found.items()})
    assert TASK.check(statistics) is None
    assert TASK.metrics(statistics) == pytest.approx(scores(model, tokenizer, rows), rel=1e-4)
    torch.testing.assert_close(sums, -torch.stack(each), rtol=1e-4, atol=1e-4)
    assert counts.tolist() == [len(row["options"][row["answer"]].split()) for row in rows]


def test_logits_are_those_of_the_options_tokens_only(home, monkeypatch):
    monkeypatch.setattr(token_losses, "_LOGITS", 1)
    model, tokenizer, _ = TASK.load(str(home / "llama"), (), 0)
    model.requires_grad_(False)
    rows, seen = questions(5, seed=6), []
    inputs, targets = TASK.encode(tokenizer, columns(rows), 64).batch(torch.arange(5), CPU)
    model.get_output_embeddings().register_forward_hook(lambda *call: seen.append(call[-1].shape[:-1].numel()))
    TASK.losses(model, inputs, targets)
    tokens = sum(len(option.split()) for row in rows for option in row["options"])
    assert seen == [1] * (tokens + 1), "one at a time, and one that the call of the model itself ends with"


def test_clients_that_share_a_pass_have_their_own_statistics_and_filler_rows_count_for_none(home):
    model, tokenizer, _ = TASK.load(str(home / "llama"), (), 0)
    rows, real = questions(12, seed=4), torch.arange(6) < torch.tensor([6, 2])[:, None]
    examples = TASK.encode(tokenizer, columns(rows), 64)
    with torch.inference_mode():
        together = TASK.measure(model.eval(), *examples.batch(torch.arange(12), CPU), real)
        for i, kept in enumerate((torch.arange(6), torch.arange(6, 8))):
            alone = TASK.measure(model, *examples.batch(kept, CPU), torch.ones(1, len(kept), dtype=torch.bool))
            torch.testing.assert_close({n: x[i] for n, x in together.items()}, {n: x[0] for n, x in alone.items()})
    empty = TASK.no_statistics(())
    assert {n: (x[0].shape, x.dtype) for n, x in together.items()} == {n: (x.shape, x.dtype) for n, x in empty.items()}


def test_impossible_statistics_are_rejected():
    honest = {**TASK.no_statistics(()), "targets": torch.tensor(3), "right": torch.tensor(2)}
    assert TASK.check(Statistics(3, honest)) is None
    assert "of 4 questions" in TASK.check(Statistics(4, honest))
    assert "of 3 questions" in TASK.check(Statistics(3, {**honest, "right_per_byte": torch.tensor(4)}))
    assert "negative" in TASK.check(Statistics(3, {**honest, "loss": torch.tensor(-1.0).double()}))


def test_a_question_is_truncated_on_its_left_and_without_room_has_no_target(tokenizer):
    row = {"prompt": " ".join(WORDS[:6]), "options": [WORDS[7], f"{WORDS[8]} {WORDS[9]}"], "answer": 1}
    whole, cut = (TASK.encode(tokenizer, columns([row]), length) for length in (10, 7))
    ids = tokenizer.convert_tokens_to_ids([*WORDS[:6], WORDS[7], WORDS[5], WORDS[8], WORDS[9]])
    assert whole.features["input_ids"].tolist() == ids and cut.features["input_ids"].tolist() == ids[3:]
    assert (
        cut.features["option"].tolist() == [0, 0, 1, 1, 2, 2, 2] and whole.targets.tolist() == [1] == cut.targets.tolist()
    )
    assert cut.features["position_ids"].tolist() == [0, 1, 2, 3, 2, 3, 4]
    without = TASK.encode(tokenizer, columns([row]), 4)
    assert without.targets.tolist() == [NO_TARGET] and int(without.lengths()) == 4
    none = TASK.encode(tokenizer, columns([]), 4)
    assert len(none) == 0 and not none.features


def test_the_memory_of_a_pass_is_that_of_the_longest_question_with_a_target(home):
    given = experiment(home)
    session = Session.make(given, FederatedData.make(given))
    fits = {"prompt": "bab bad", "options": ["ced", "cef"], "answer": 1}
    too_long = {**fits, "options": [" ".join(["ced"] * 30), "cef"]}
    start = lora_init(session.adapted.spec, 4, 0)
    both, one, none = (
        bytes_per_token(session.adapted, TASK, TASK.encode(session.tokenizer, columns(rows), 16), start)
        for rows in ([fits, too_long], [fits], [too_long])
    )
    assert both == one > 1 == none


def read(tmp_path, rows):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    names = {"prompt": "prompt", "options": "options", "answer": "answer"}
    return load(Data(source=str(file), test=str(file), **names), 0, TASK.columns(names)).train["answer"][:]


def test_an_answer_is_the_text_or_the_index_of_an_option(tmp_path):
    numbers = {"prompt": "p", "options": ["2", "0", "1"]}
    letters = {"prompt": "p", "options": ["A", "B", "C"]}
    rows = [{**letters, "answer": "C"}, {**letters, "answer": 2}, {**letters, "answer": "2"}]
    assert read(tmp_path, [*rows, {**numbers, "answer": "2"}, {**numbers, "answer": 2}]) == [2, 2, 2, 0, 2]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "secret"}, r"\(data\.answer\): row 2 has an answer that is not among its 2 options"),
        ({"answer": 2}, r"row 2 has an answer that is not among its 2 options"),
        ({"answer": -1}, r"row 2 has an answer that is not among its 2 options"),
        ({"answer": True}, r"row 2 is of type bool, not an index or the text of an option"),
        ({"answer": None}, r"row 2 has no answer"),
        ({"options": ["secret"]}, r"row 2 has a single option"),
        ({"options": ["b", "b"]}, r"row 2 has an answer that is the text of 2 options"),
        ({"options": ["secret", ""]}, r"\(data\.options\): row 2 has an element that is empty"),
        ({"prompt": ""}, r"\(data\.prompt\): row 2 is empty"),
    ],
)
def test_invalid_questions_are_rejected_with_their_place_and_without_their_content(tmp_path, row, message):
    valid = {"prompt": "p", "options": ["a", "b"], "answer": "b"}
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path, [valid, {**valid, **row}])
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


def test_models_whose_options_influence_each_other_are_rejected(tmp_path):
    tiny_lm(tmp_path, "mamba", hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(UserError, match="cannot be used for multiple choice"):
        TASK.load(str(tmp_path), (), 0)


def experiment(home, **more):
    """Multiple choice by three clients."""
    names = {name: name for name in ("prompt", "options", "answer")}
    data = {"source": str(home / "train.jsonl"), "test": str(home / "test.jsonl"), **names}
    clients = {"count": 3, "partition": "iid"}
    table = {"task": "multiple-choice", "model": str(home / "llama"), "data": data, "rounds": 1, "clients": clients}
    return build({**table, **more})


@pytest.mark.slow
def test_the_exported_adapter_and_the_merged_model_reach_the_logged_metrics(home, tmp_path, monkeypatch):
    done = run(experiment(home, train={"lr": 0.02}, rounds=2), tmp_path / "run", False)
    found = {name: done.rows[-1].global_[name] for name in ("acc_norm", "acc", "loss")}
    monkeypatch.chdir(done.adapters[""])
    (code,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    export(tmp_path / "run", "merged", tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    rows = [json.loads(line) for line in (home / "test.jsonl").read_text().splitlines()]
    for model in (names["model"], merged):
        assert scores(model, names["tokenizer"], rows) == pytest.approx(found, rel=1e-4)
    assert found["loss"] < done.rows[0].global_["loss"] and repr(done).startswith("Result(fedit, 2 rounds, test acc_norm")


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["choice", "answer"])
def test_one_client_learns_as_a_loop_with_peft_and_one_pass_for_each_option(home, tmp_path, objective):
    settings = {"optimizer": "sgd", "lr": 0.05, "batch_size": 60}
    clients = {"count": 1, "partition": "iid", "held_out": 0.0}
    task = {"kind": "multiple-choice", "objective": objective}
    given = experiment(home, clients=clients, train=settings, rounds=2, evaluate={"clients": "none"}, task=task)
    losses = [row.train_loss for row in run(given, tmp_path / "run", False).rows[1:]]
    session = Session.make(given, FederatedData.make(given))
    start = RunState(session.method.init_server(session.adapted.spec, given.seed))
    folder = RunFolder.create(tmp_path / "start")
    write_exports(session, session.adapters(start, folder, 0), tmp_path / "adapter", "adapter")
    folder.release()
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", is_trainable=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "adapter")
    rows = [json.loads(line) for line in (home / "train.jsonl").read_text().splitlines()]
    optimizer, expected = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05), []
    for _ in range(2):
        each = [likelihoods(model, tokenizer, row) for row in rows]
        if objective == "choice":
            loss = -sum(one.log_softmax(0)[row["answer"]] for one, row in zip(each, rows, strict=True)) / len(rows)
        else:
            tokens = sum(len(row["options"][row["answer"]].split()) for row in rows)
            loss = -sum(one[row["answer"]] for one, row in zip(each, rows, strict=True)) / tokens
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(loss.detach()))
    assert losses == pytest.approx(expected, rel=1e-5) and losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_questions_are_packed_and_clients_trained_in_one_step(home, kind):
    session = Session.make(given := experiment(home, model=str(home / kind)), FederatedData.make(given))
    assert session.adapted.packing.works and session.trainer.clients_per_step == given.train.clients_per_step
    assert session.adapted.head == ()


@pytest.mark.slow
def test_a_resumed_run_of_multiple_choice_in_bf16_ends_as_an_uninterrupted_one(home, tmp_path):
    training = {"precision": "bf16", "lr": 0.01}
    whole = run(experiment(home, rounds=2, train=training), tmp_path / "whole", False)
    run(experiment(home, train=training), tmp_path / "parts", False)
    parts = resume(tmp_path / "parts", False, ["rounds=2"])
    assert parts.rows[-1].global_ == whole.rows[-1].global_ and parts.rows[-1].clients == whole.rows[-1].clients
    assert whole.rows[-1].global_["loss"] < whole.rows[0].global_["loss"]


def test_a_missing_column_is_named(home):
    with pytest.raises(UserError, match=r"data\.options: the task needs this setting"):
        FederatedData.make(experiment(home, data={"source": str(home / "train.jsonl"), "prompt": "prompt"}))
