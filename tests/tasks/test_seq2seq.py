"""Encoding, statistics, training, generation and export of sequence-to-sequence models."""

import json
import random
from dataclasses import replace

import pytest
import torch
import transformers
from peft import AutoPeftModelForSeq2SeqLM
from torch.nn import functional
from torch.testing import assert_close

from batched_jobs import jobs
from fedlora.adapter import Scaling, lora_init, pack
from fedlora.api import export, resume, run
from fedlora.config.experiment import build
from fedlora.config.sections import Train
from fedlora.errors import UserError
from fedlora.federated_data import FederatedData
from fedlora.messages import Statistics
from fedlora.models.adapted import AdaptedModel
from fedlora.models.generate import generate
from fedlora.rounds.plan import RunState
from fedlora.run_exports import write_exports
from fedlora.runs.folder import RunFolder
from fedlora.session import Session, check
from fedlora.tasks.seq2seq import Seq2Seq
from fedlora.tasks.task import NO_TARGET, Task
from fedlora.train.batched import train_together
from fedlora.train.evaluate import score
from fedlora.train.micro_batches import bytes_per_token
from tiny_lm import pair, pair_rows
from tiny_seq2seq import KINDS, seq2seq_tokenizer, tiny_seq2seq

from tiny import WORDS, tiny_model

CPU = torch.device("cpu")
TASK: Task = Seq2Seq(max_target_length=32)
COLUMNS = {name: [pair(i)[place] for i in range(24)] for place, name in enumerate(("prompt", "response"))}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a T5, a BART and training rows."""
    folder = tmp_path_factory.mktemp("seq2seq")
    for kind in KINDS:
        tiny_seq2seq(folder / kind, kind)
    pair_rows(folder / "rows.jsonl", 40)
    return folder


def experiment(home, kind="t5", **more):
    """Four clients with ten rows each."""
    table = {
        "model": str(home / kind),
        "task": {"kind": "seq2seq", "max_target_length": 32},
        "data": {"source": str(home / "rows.jsonl"), "prompt": "prompt", "response": "response"},
        "rounds": 1,
        "clients": {"count": 4, "partition": "iid"},
        "method": {"name": "fedit", "rank": 4},
    }
    return build({**table, **more})


def loaded(home, kind):
    """A model whose weights are so large that its answers vary, its tokenizer, and all examples."""
    model, tokenizer, _ = TASK.load(str(home / kind), (), 0)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3, generator=rng)
    return model.eval(), tokenizer, TASK.encode(tokenizer, COLUMNS, 32)


def texts(tokenizer, ids):
    return " ".join(tokenizer.convert_ids_to_tokens(ids)).replace("\u2581", "")


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_and_answers_are_encoded_as_the_tokenizer_does_and_end_in_eos(kind):
    tokenizer = seq2seq_tokenizer(kind)
    examples = Seq2Seq(prefix="bab bad ").encode(tokenizer, COLUMNS, 32)
    for i, (prompt, answer) in enumerate(zip(*COLUMNS.values(), strict=True)):
        at, to = (slice(*starts[i : i + 2].tolist()) for starts in (examples.starts, examples.target_starts))
        assert examples.features["input_ids"][at].tolist() == tokenizer(f"bab bad {prompt}")["input_ids"]
        assert examples.targets[to].tolist() == tokenizer(answer)["input_ids"]
    inputs, targets = examples.batch(torch.arange(24), CPU)
    assert torch.equal(inputs["attention_mask"] == 0, inputs["input_ids"] == tokenizer.pad_token_id)
    assert (targets == tokenizer.eos_token_id).sum(1).tolist() == [1] * 24
    assert ((targets == NO_TARGET).long().diff(dim=1) >= 0).all(), "padding only follows the answer"


def test_a_prompt_keeps_its_eos_if_truncated_and_an_answer_does_not():
    tokenizer = seq2seq_tokenizer("t5")
    columns = {"prompt": ["bab bad baf bak", "bab"], "response": ["ceb ced cef", "ceb ced"]}
    examples = Seq2Seq(max_target_length=3).encode(tokenizer, columns, 3)
    assert texts(tokenizer, examples.features["input_ids"].tolist()) == "bab bad </s> bab </s>"
    assert texts(tokenizer, examples.targets.tolist()) == "ceb ced cef ceb ced </s>"
    assert examples.truncated == {"prompt": 1, "answer": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_are_those_of_explicit_decoder_inputs_one_example_at_a_time(home, kind):
    model, tokenizer, examples = loaded(home, kind)
    start = model.config.decoder_start_token_id
    sums, counts = TASK.losses(model, *examples.batch(torch.arange(24), CPU))
    for i, (prompt, answer) in enumerate(zip(*COLUMNS.values(), strict=True)):
        labels = tokenizer(answer, return_tensors="pt")["input_ids"]
        before = torch.cat([torch.tensor([[start]]), labels[:, :-1]], 1)
        logits = model(**tokenizer(prompt, return_tensors="pt"), decoder_input_ids=before).logits
        assert counts[i] == labels.shape[1]
        assert_close(sums[i], functional.cross_entropy(logits[0], labels[0], reduction="sum"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_accuracy_is_the_exact_match_of_greedy_answers(home, kind):
    model, _, examples = loaded(home, kind)
    adapted = AdaptedModel(model, Scaling(8.0), "all-linear")
    prompts = torch.tensor_split(examples.features["input_ids"], examples.starts[1:-1])
    (answers,) = generate(adapted, [(prompts, {})], 6, (), 64)
    targets = torch.cat(answers)
    targets[5::18] += 1  # the last token of each third answer
    same = replace(examples, targets=targets, target_starts=torch.arange(25) * 6)
    (found,) = score(adapted, TASK, same, [(torch.arange(24), {})], 5)
    metrics = TASK.metrics(found)
    assert metrics["accuracy"] == 16 / 24 and metrics["token_accuracy"] == 1 - 8 / (24 * 6)


def test_statistics_of_clients_that_share_a_pass_add_up_to_those_of_all_examples(home):
    model, _, examples = loaded(home, "bart")
    inputs, targets = examples.batch(torch.arange(24), CPU)
    real = torch.arange(8) < torch.tensor([8, 3, 5])[:, None]
    none = TASK.no_statistics(())
    with torch.inference_mode():
        parts = TASK.measure(model, inputs, targets, real)
        alone = TASK.measure(
            model, *examples.batch(real.flatten().nonzero()[:, 0], CPU), torch.ones(1, 16, dtype=torch.bool)
        )
    assert all(x.dtype == none[name].dtype and x.shape == (3,) for name, x in parts.items()) and parts.keys() == none.keys()
    each = [Statistics(n, {name: x[i] for name, x in parts.items()}) for i, n in enumerate((8, 3, 5))]
    assert not any(map(TASK.check, each))
    total = TASK.metrics(each[0] + each[1] + each[2])
    assert total == pytest.approx(TASK.metrics(Statistics(16, {name: x[0] for name, x in alone.items()})), rel=1e-6)


@pytest.mark.parametrize(
    ("sums", "reason"),
    [
        ({"loss": -1.0, "tokens": 9, "right": 2, "exact": 1}, "negative"),
        ({"loss": 1.0, "tokens": 3, "right": 2, "exact": 1}, "3 targets"),
        ({"loss": 1.0, "tokens": 9, "right": 10, "exact": 1}, "10 of them"),
        ({"loss": 1.0, "tokens": 9, "right": 8, "exact": 5}, "5 answers right"),
    ],
)
def test_statistics_of_no_examples_are_rejected(sums, reason):
    assert reason in (TASK.check(Statistics(4, {name: torch.tensor(x) for name, x in sums.items()})) or "")


@pytest.mark.parametrize("kind", KINDS)
def test_one_client_learns_as_a_loop_with_peft(home, tmp_path, kind):
    given = experiment(
        home,
        kind,
        clients={"count": 1, "partition": "iid", "held_out": 0.0},
        data={**dict(experiment(home).data), "test_fraction": 0.1},
        train={"optimizer": "sgd", "lr": 0.3, "batch_size": 36},
        rounds=4,
        evaluate={"clients": "none"},
    )
    losses = [row.train_loss for row in run(given, tmp_path / "run", False).rows[1:]]
    federated_data = FederatedData.make(given)
    session = Session.make(given, federated_data)
    start = RunState(session.method.init_server(session.adapted.spec, given.seed))
    folder = RunFolder.create(tmp_path / "start")
    write_exports(session, session.adapters(start, folder, 0), tmp_path / "adapter", "adapter")
    folder.release()
    model = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter", is_trainable=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "adapter")
    rows = federated_data.labelled_data.train[:]
    inputs = tokenizer(rows["prompt"], text_target=rows["response"], padding=True, return_tensors="pt")
    inputs["labels"][inputs["labels"] == tokenizer.pad_token_id] = -100
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    expected = []
    for _ in range(4):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(loss.detach()))
    assert losses == pytest.approx(expected, rel=1e-5) and expected[-1] < expected[0] - 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_clients_learn_together_what_each_learns_alone(home, tmp_path, kind, precision):
    found = []
    for n in (1, 4):
        train = {"clients_per_step": n, "precision": precision, "lr": 0.01}
        found.append(run(experiment(home, kind, train=train), tmp_path / str(n), False))
        assert json.loads((tmp_path / str(n) / "environment.json").read_text())["clients_per_step"] == n
    alone, together = (result.rows[-1] for result in found)
    assert together.train_loss == pytest.approx(alone.train_loss, rel=1e-5 if precision == "fp32" else 0.02)
    assert together.global_ == pytest.approx(alone.global_, rel=1e-4 if precision == "fp32" else 0.05)


def test_the_memory_of_a_pass_is_estimated_by_an_example_with_a_long_answer(home):
    given = experiment(home)
    session = Session.make(given, FederatedData.make(given))
    start, examples = lora_init(session.adapted.spec, 4, 0), []
    for sizes in ([(10, 1)], [(9, 25)], [(10, 1), (9, 25)]):
        columns = {name: [" ".join(WORDS[: size[i]]) for size in sizes] for i, name in enumerate(("prompt", "response"))}
        examples.append(TASK.encode(session.tokenizer, columns, 32))
    short, long, both = (bytes_per_token(session.adapted, TASK, one, start) for one in examples)
    assert both == long > 2 * short


DROPOUT = {"dropout_rate": 0.1, "dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1}
LENGTHS = {
    "the longest prompt and answer differ": ((6, 2), (3, 9), (5, 4), (1, 1)),
    "the longest prompt and answer are equal": ((6, 2), (3, 6), (5, 5), (1, 1)),
}
"""The largest numbers of words in the prompts and in the answers of four clients."""


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_with_dropout_clients_get_together_what_each_gets_alone(tmp_path, kind, lengths):
    model, tokenizer, _ = TASK.load(str(tiny_seq2seq(tmp_path / kind, kind, **DROPOUT)), (), 0)
    adapted = AdaptedModel(model, Scaling(8.0), "all-linear", dropout=0.1)
    some, columns = jobs(adapted), {"prompt": [""] * 44, "response": [""] * 44}
    for job, most in zip(some, lengths, strict=True):
        for column, n in zip(columns.values(), most, strict=True):
            for i, row in enumerate(job.rows.tolist()):
                column[row] = " ".join(WORDS[row % 40 :][: max(1, n - i % 4)])
    examples, settings = TASK.encode(tokenizer, columns, 32), Train(batch_size=4, lr=0.1, optimizer="sgd")
    together = train_together(adapted, TASK, examples, some, settings, 100_000)
    for job, one in zip(some, together, strict=True):
        (alone,) = train_together(adapted, TASK, examples, [job], settings, 100_000)
        (still,) = train_together(adapted, TASK, examples, [replace(job, seed=job.seed + 9)], settings, 100_000)
        assert one.loss == pytest.approx(alone.loss, rel=1e-5) and still.loss != pytest.approx(alone.loss, rel=1e-4)
        assert_close(pack(one.adapter), pack(alone.adapter), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_models_with_dropout_train_many_clients_in_one_step(home, tmp_path, kind):
    tiny_seq2seq(tmp_path / kind, kind, **DROPOUT)
    given = experiment(tmp_path, kind, data={**dict(experiment(home).data)})
    session = Session.make(given, FederatedData.make(given))
    assert session.trainer.clients_per_step == given.train.clients_per_step > 1
    assert not [note for note in session.notes if "one at a time" in note]


def words_of_classes(path, count):
    """Prompts of words of one of three groups, and the name of the group, two words, as the answer."""
    rng, names = random.Random(count), ("mob mod", "nub", "nur mod")
    made = [
        {"prompt": " ".join(rng.choices(WORDS[8 * (i % 3) :][:8], k=rng.randint(2, 5))), "response": names[i % 3]}
        for i in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, made)))
    return str(path)


@pytest.mark.slow
def test_a_t5_without_pretraining_learns_to_answer_with_the_names_of_classes(home, tmp_path):
    given = experiment(
        home,
        data={
            "source": words_of_classes(tmp_path / "train.jsonl", 120),
            "test": words_of_classes(tmp_path / "test.jsonl", 31),
            "prompt": "prompt",
            "response": "response",
        },
        lora={"targets": "all-linear"},
        clients={"count": 3, "partition": "dirichlet", "alpha": 100.0},
        evaluate={"clients": "none", "generate": 50, "max_new_tokens": 4},
        train={"lr": 0.02, "epochs": 4},
        rounds=2,
    )
    first, *_, last = run(given, tmp_path / "run", False).rows
    assert last.global_["loss"] < first.global_["loss"] / 4
    assert first.global_["accuracy"] < 0.4 and last.global_["accuracy"] > 0.9
    assert last.global_["exact_match"] == pytest.approx(100 * last.global_["accuracy"])
    written = [json.loads(line) for line in (tmp_path / "run/samples/round-2.jsonl").read_text().splitlines()]
    assert len(written) == 31 and written[0]["references"] == ["mob mod"]


@pytest.mark.parametrize("kind", KINDS)
def test_only_eos_ends_a_generated_answer_though_answers_of_bart_begin_with_bos(home, kind):
    given = experiment(home, kind, evaluate={"generate": 3, "max_new_tokens": 8})
    session = Session.make(given, FederatedData.make(given))
    generation = session.generation
    assert generation is not None and list(generation.stop) == [session.tokenizer.eos_token_id]
    test = session.federated_data.labelled_data.test[:]
    shown = [json.loads(line) for line in generation.samples([""] * 3).splitlines()]
    assert {one["references"][0] for one in shown} <= {*test["response"]}
    assert all(any(prompt in one["prompt"] for prompt in test["prompt"]) for one in shown)


def test_answers_are_classes_of_the_partition_only_if_they_are_few():
    assert TASK.partition_keys({"response": ["b", "a", "b", "a"]}) == [1, 0, 1, 0]
    assert TASK.partition_keys({"response": ["b", "a", "b", "c"]}) is None
    assert TASK.partition_keys({"response": [str(i % 101) for i in range(999)]}) is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_exported_adapter_and_the_merged_model_reach_the_logged_loss(home, tmp_path, kind):
    done = run(experiment(home, kind, train={"lr": 0.02}), tmp_path / "run", False)
    folder, names = done.adapters[""], {}
    code = folder.joinpath("README.md").read_text().partition("```python\n")[2].partition("```")[0]
    exec(code.replace("Path()", repr(folder)).replace("PosixPath", "Path"), names)
    assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    export(tmp_path / "run", "merged", tmp_path / "merged")
    merged = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    test = FederatedData.make(experiment(home, kind)).labelled_data.test[:]
    for model in (names["model"].eval(), merged.eval()):
        examples = TASK.encode(names["tokenizer"], test, 32)
        with torch.inference_mode():
            sums, counts = TASK.losses(model, *examples.batch(torch.arange(len(examples)), CPU))
        assert float(sums.sum() / counts.sum()) == pytest.approx(done.rows[-1].global_["loss"], rel=1e-4)


@pytest.mark.slow
def test_a_resumed_run_ends_as_an_uninterrupted_one(home, tmp_path):
    whole = run(experiment(home, "bart", rounds=2), tmp_path / "whole", False)
    run(experiment(home, "bart"), tmp_path / "parts", False)
    parts = resume(tmp_path / "parts", False, ["rounds=2"])
    assert parts.rows[-1].global_ == whole.rows[-1].global_ and parts.rows[-1].clients == whole.rows[-1].clients


def rejected(given):
    federated_data = FederatedData.make(given)
    with pytest.raises(UserError) as found:
        check(given, federated_data)
    with pytest.raises(UserError) as again:
        Session.make(given, federated_data)
    assert "\n" not in str(found.value) and str(found.value) == str(again.value)
    return str(found.value)


def test_models_that_cannot_write_such_answers_are_rejected(home, tmp_path):
    long = {"kind": "seq2seq", "max_target_length": 65}
    assert "task.max_target_length = 65" in rejected(experiment(home, "bart", task=long))
    config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    tiny_model(tmp_path / "bert", config, seq2seq_tokenizer("bart"))
    assert "has no AutoModelForSeq2SeqLM for 'bert'" in rejected(experiment(home, str(tmp_path / "bert")))


def test_a_checkpoint_without_its_output_layer_is_rejected(home, tmp_path):
    config = transformers.AutoConfig.from_pretrained(home / "bart", tie_word_embeddings=False)
    tiny_model(tmp_path / "bart", config, seq2seq_tokenizer("bart"))
    with pytest.raises(UserError, match=r"the checkpoint lacks lm_head\.weight"):
        TASK.load(str(tmp_path / "bart"), (), 0)


def test_an_answer_that_contains_eos_is_rejected_without_quoting_it():
    with pytest.raises(UserError, match="1 of 2 texts contain special tokens of the tokenizer, such as '</s>'") as found:
        TASK.encode(seq2seq_tokenizer("t5"), {"prompt": ["bab", "bad"], "response": ["ceb", "ced </s> cef"]}, 16)
    assert "ced" not in str(found.value)


def test_a_prompt_without_its_answer_is_rejected(home):
    data = {"source": str(home / "rows.jsonl"), "prompt": "prompt"}
    with pytest.raises(UserError, match=r"data\.response: the task needs this setting"):
        FederatedData.make(experiment(home, data=data))


def test_free_answers_cannot_be_partitioned_by_class(home):
    with pytest.raises(UserError, match=r"clients\.partition = 'dirichlet' .* set clients\.partition to 'iid'"):
        FederatedData.make(experiment(home, clients={"count": 4}))
