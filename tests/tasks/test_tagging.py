"""Token classification: alignment of words and tokens, entities, and runs."""

import json
import math
import random
import re
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import peft
import pyarrow as pa
import pytest
import torch
import transformers
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from fedlora.api import export, resume, run
from fedlora.config.experiment import build
from fedlora.config.sections import Data
from fedlora.data.memory import MEMORY
from fedlora.data.sources import load
from fedlora.errors import UserError
from fedlora.federated_data import FederatedData
from fedlora.messages import Statistics
from fedlora.rounds.plan import RunState
from fedlora.run_exports import write_exports
from fedlora.runs.folder import RunFolder
from fedlora.session import Session, check
from fedlora.tasks.entities import scheme
from fedlora.tasks.tagging import Tagging
from fedlora.tasks.task import NO_TARGET, Task

from tiny import WORDS, tiny_bert

TASK: Task = Tagging()
CPU = torch.device("cpu")
BIO = ("B-LOC", "B-PER", "I-LOC", "I-PER", "O")
LETTERS = ("O", "B-X", "I-X", "E-X", "S-X", "B-Y", "I-Y", "L-Y", "U-Y")
NONE = "O"


def spans(tags):
    """The entities of one text, word by word: (type, first word, word after the last)."""
    found, begun = set(), None
    for i, tag in enumerate([*tags, "O"]):
        letter, _, of = tag.partition("-")
        before = tags[i - 1] if i else "O"
        new = letter in ("B", "S", "U") or before == "O" or before[0] in "ELSU" or before.partition("-")[2] != of
        if begun is not None and (tag == "O" or new):
            found.add((*begun, i))
            begun = None
        if tag != "O" and new:
            begun = (of, i)
    return found


def expected(gold, predicted):
    """Precision, recall, F1 and macro F1 of entities, from sets of spans."""
    pairs = [(spans(g), spans(p)) for g, p in zip(gold, predicted, strict=True)]

    def counts(of=None):
        kept = [[{span for span in one if of in (None, span[0])} for one in pair] for pair in pairs]
        return [sum(map(len, x)) for x in zip(*((g & p, p, g) for g, p in kept), strict=True)]

    def f1(right, some, all_):
        return 2 * right / (some + all_) if some + all_ else math.nan

    right, some, all_ = counts()
    types = {span[0] for pair in pairs for one in pair for span in one}
    each = [f1(*counts(of)) for of in types]
    return {
        "precision": right / some if some else math.nan,
        "recall": right / all_ if all_ else math.nan,
        "f1": f1(right, some, all_),
        "f1_macro": sum(each) / len(each) if each else math.nan,
    }


class Fixed(nn.Module):
    """A model that answers with these logits, and knows the tags."""

    def __init__(self, logits, labels=BIO):
        super().__init__()
        self.logits, self.config = logits, SimpleNamespace(id2label=dict(enumerate(labels)))

    def forward(self, **inputs):
        return SimpleNamespace(logits=self.logits)


def with_pieces(folder: Path) -> Path:
    """A tiny BERT whose words may end in the pieces ##s and ##t."""
    tiny_bert(folder, dropout=0.0)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "##s", "##t"]
    file = folder / "pieces.txt"
    file.write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    transformers.BertTokenizerFast(str(file), model_max_length=64).save_pretrained(folder)
    return folder


def texts(count, seed=0):
    """Texts as words of one to three pieces, with tags; the words tell whether an entity begins or continues."""
    rng, rows = random.Random(seed), []
    for i in range(count):
        tags = []
        for _ in range(rng.randint(2, 9)):
            tags.append(rng.choice([*BIO, "O"]))
        firsts = [WORDS[15 * BIO.index(tag) + rng.randrange(15)] for tag in tags]
        words = [word + rng.choice(["", "s", "st"]) for word in firsts]
        rows.append({"tokens": words, "tags": tags, "user": f"u{i % 3}"})
    return rows


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model, training rows and test rows."""
    folder = tmp_path_factory.mktemp("tagging")
    with_pieces(folder / "model")
    for name, count in (("train", 60), ("test", 20)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, texts(count, seed=count))))
    return folder


@pytest.fixture(scope="module")
def tokenizer(home):
    return transformers.AutoTokenizer.from_pretrained(home / "model")


def encoded(tokenizer, rows, max_length=64, task=TASK):
    ids = [[BIO.index(tag) for tag in row["tags"]] for row in rows]
    return task.encode(tokenizer, {"tokens": [row["tokens"] for row in rows], "tags": ids}, max_length)


@pytest.mark.parametrize("labels", [BIO, LETTERS])
def test_entities_are_counted_as_the_sets_of_their_spans(labels):
    rng = random.Random(1)
    gold, predicted = ([rng.choices(labels, k=7) for _ in range(200)] for _ in range(2))
    mixed = [
        [g if rng.random() < 0.7 else p for g, p in zip(*pair, strict=True)] for pair in zip(gold, predicted, strict=True)
    ]
    ids = [torch.tensor([[labels.index(tag) for tag in row] for row in rows]) for rows in (gold, mixed)]
    counts = scheme(labels).counts(*ids)
    for row, (g, m) in enumerate(zip(gold, mixed, strict=True)):
        for i, of in enumerate(scheme(labels).types):
            own = [{span for span in spans(tags) if span[0] == of} for tags in (g, m)]
            assert counts[row, i].tolist() == [len(own[0] & own[1]), len(own[1]), len(own[0])]


def test_an_inner_tag_without_a_first_one_begins_an_entity():
    assert spans(["I-X", "I-X", "O", "I-Y", "I-X"]) == {("X", 0, 2), ("Y", 3, 4), ("X", 4, 5)}
    tags = torch.tensor([[LETTERS.index(tag) for tag in ("I-X", "I-X", "O", "I-Y", "I-X")]])
    assert scheme(LETTERS).counts(tags, tags).tolist() == [[[2, 2, 2], [1, 1, 1]]]


@pytest.mark.parametrize("labels", [("NOUN", "VERB"), ("O", "B-X", "VERB"), ("O",)])
def test_tags_that_do_not_mark_entities_have_no_scheme_and_accuracy_as_main_metric(labels):
    assert scheme(labels) is None
    zero = Statistics(1, {n: x + 1 for n, x in TASK.no_statistics(labels).items()})
    assert next(iter(TASK.metrics(zero))) == "accuracy" and TASK.check(zero) is None


@pytest.mark.parametrize("max_length", [64, 8, 5])
def test_metrics_are_those_of_the_words_with_truncated_ones_as_missed(tokenizer, max_length):
    rows = texts(40, seed=3)
    examples = encoded(tokenizer, rows, max_length)
    inputs, targets = examples.batch(torch.arange(len(rows)), CPU)
    logits = torch.randn(*inputs["input_ids"].shape, len(BIO), generator=torch.Generator().manual_seed(0))
    found = TASK.measure(Fixed(logits), inputs, targets, torch.ones(1, len(rows), dtype=torch.bool))
    predicted, right, losses = [], 0, []
    for i, row in enumerate(rows):
        pieces = tokenizer(row["tokens"], is_split_into_words=True, truncation=True, max_length=max_length)
        at = {word: place for place, word in reversed(list(enumerate(pieces.word_ids()))) if word is not None}
        guess = [BIO[int(logits[i, at[w]].argmax())] if w in at else None for w in range(len(row["tokens"]))]
        right += sum(g == p for g, p in zip(row["tags"], guess, strict=True))
        losses += [-float(logits[i, p].log_softmax(-1)[BIO.index(row["tags"][w])]) for w, p in at.items()]
        predicted.append([tag or "O" for tag in guess])
    statistics = Statistics(len(rows), {name: x[0] for name, x in found.items()})
    gold = [row["tags"] for row in rows]
    assert TASK.check(statistics) is None
    assert TASK.metrics(statistics) == pytest.approx(
        {
            **expected(gold, predicted),
            "accuracy": right / sum(map(len, gold)),
            "loss": sum(losses) / len(losses),
        },
        rel=1e-5,
    )
    sums, counts = TASK.losses(Fixed(logits), inputs, targets)
    assert float(sums.sum()) == pytest.approx(sum(losses), rel=1e-5) and int(counts.sum()) == len(losses)


def test_clients_that_share_a_pass_have_their_own_statistics_and_filler_rows_count_for_none(tokenizer):
    rows = texts(12, seed=4)
    inputs, targets = encoded(tokenizer, rows).batch(torch.arange(12), CPU)
    logits = torch.randn(*inputs["input_ids"].shape, len(BIO), generator=torch.Generator().manual_seed(0))
    real = torch.arange(6) < torch.tensor([6, 2])[:, None]
    together = TASK.measure(Fixed(logits), inputs, targets, real)
    empty = TASK.no_statistics(BIO)
    for i, kept in enumerate((slice(0, 6), slice(6, 8))):
        own = {name: x[kept] for name, x in inputs.items()}
        alone = TASK.measure(Fixed(logits[kept]), own, targets[kept], torch.ones(1, len(logits[kept]), dtype=torch.bool))
        torch.testing.assert_close({n: x[i] for n, x in together.items()}, {n: x[0] for n, x in alone.items()})
    assert {n: (x[0].shape, x.dtype) for n, x in together.items()} == {n: (x.shape, x.dtype) for n, x in empty.items()}


def test_without_entities_their_metrics_are_undefined_and_contradictions_are_rejected():
    sums = {**TASK.no_statistics(BIO), "targets": torch.tensor(3), "words": torch.tensor(3), "right": torch.tensor(3)}
    found = TASK.metrics(Statistics(1, sums))
    assert all(math.isnan(found[name]) for name in ("f1", "precision", "recall", "f1_macro")) and found["accuracy"] == 1
    assert TASK.check(Statistics(1, sums)) is None
    assert "fewer" in TASK.check(Statistics(4, sums))
    assert "more than" in TASK.check(Statistics(1, {**sums, "right": torch.tensor(4)}))
    assert "entities" in TASK.check(Statistics(1, {**sums, "entities": torch.tensor([[1, 0, 1], [0, 0, 0]])}))
    assert "negative" in TASK.check(Statistics(1, {**sums, "loss": torch.tensor(-1.0).double()}))


def test_the_first_token_of_a_word_has_its_tag_and_if_set_the_others_the_inner_one(tokenizer):
    row = {"tokens": [WORDS[0] + "st", WORDS[1]], "tags": ["B-PER", "O"]}
    person, inside, outside = (BIO.index(tag) for tag in ("B-PER", "I-PER", "O"))
    for task, others in ((TASK, NO_TARGET), (Tagging(all_subwords=True), inside)):
        inputs, targets = encoded(tokenizer, [row], task=task).batch(torch.tensor([0]), CPU)
        logits = torch.zeros(1, inputs["input_ids"].shape[1], len(BIO))
        wanted = [NO_TARGET, person, others, others, outside, NO_TARGET]
        for place, tag in enumerate(wanted):
            logits[0, place, tag if tag != NO_TARGET else 0] = 50.0
        sums, counts = task.losses(Fixed(logits), inputs, targets)
        assert float(sums) < 1e-9 and int(counts) == sum(tag != NO_TARGET for tag in wanted)
        found = task.measure(Fixed(logits), inputs, targets, torch.ones(1, 1, dtype=torch.bool))
        assert found["right"].tolist() == [2] == found["words"].tolist()


@pytest.mark.parametrize("all_subwords", [False, True])
def test_a_check_shows_no_tags_as_if_they_were_tokens(home, all_subwords):
    given = experiment(home, task={"kind": "tagging", "all_subwords": all_subwords})
    assert not [note for note in check(given, FederatedData.make(given)) if "first example" in note or "targets" in note]


def test_a_text_without_any_word_left_has_no_target(tokenizer):
    rows = texts(3)
    assert encoded(tokenizer, rows, max_length=2).have_targets().tolist() == [False] * 3
    assert len(encoded(tokenizer, [])) == 0


def byte_level(sequence=False):
    """A tokenizer of GPT-2's kind: blanks are part of the tokens that follow them."""
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġa", "Ġb", "</s>"]
    merges = [("Ġ", "a"), ("Ġ", "b")]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, merges))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([level]) if sequence else level
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")


@pytest.mark.parametrize("sequence", [False, True])
def test_words_are_read_as_in_a_text_by_tokenizers_that_make_blanks_a_part_of_words(sequence):
    tokenizer = byte_level(sequence)
    examples = TASK.encode(tokenizer, {"tokens": [["a", "b", "ab"]], "tags": [[0, 1, 0]]}, 64)
    assert examples.features["input_ids"].tolist() == tokenizer(" a b ab")["input_ids"]
    assert examples.targets[: len(examples.features["input_ids"])].tolist() == [0, 1, 0, NO_TARGET]


def read(source, **more):
    columns = TASK.columns(())
    return load(Data(source=str(source), test=str(source), **more), 0, columns)


def write(path, rows):
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_lists_of_words_and_tags_are_read_from_every_format_that_has_lists(tmp_path, ending):
    rows = texts(9)
    found = read(write(tmp_path / f"rows.{ending}", rows))
    assert found.labels == BIO and found.train["tokens"][:] == [row["tokens"] for row in rows]
    assert [[BIO[i] for i in tags] for tags in found.test["tags"][:]] == [row["tags"] for row in rows]


def test_the_names_of_tags_come_from_a_data_set_or_a_file_beside_the_rows(tmp_path):
    rows = [{"tokens": ["a", "b"], "tags": [2, 0]}, {"tokens": ["c"], "tags": [1]}]
    (tmp_path / "labels.json").write_text(json.dumps(["O", "B-X", "I-X"]))
    features = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "tags": datasets.List(datasets.ClassLabel(names=["O", "B-X", "I-X"])),
        }
    )
    in_memory = datasets.Dataset.from_list(rows, features=features)
    arrays = [{name: np.array(value) for name, value in row.items()} for row in rows]
    named = Data(source=MEMORY, labels=["O", "B-X", "I-X"])
    for found in (
        load(named, 0, TASK.columns(()), {"train": arrays, "test": arrays}).train,
        read(write(tmp_path / "rows.jsonl", rows)).train,
        load(Data(source=MEMORY, test_fraction=0.5), 0, TASK.columns(()), {"train": in_memory, "test": in_memory}).train,
    ):
        assert found["tags"][:] == [[2, 0], [1]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["secret", "b"], "tags": ["O"]}, r"\(data\.tags\): row 2 has 1 tags for 2 words"),
        ({"tokens": [], "tags": []}, r"\(data\.tokens\): row 2 is empty"),
        ({"tokens": None, "tags": []}, r"\(data\.tokens\): row 2 is empty"),
        (
            {"tokens": "secret b", "tags": ["O", "O"]},
            r"\(data\.tokens\): row 2 is of type str, not a list; CSV has no lists",
        ),
        ({"tokens": ["secret", " "], "tags": ["O", "O"]}, r"\(data\.tokens\): row 2 has an element that is empty"),
        ({"tokens": ["secret"], "tags": [None]}, r"\(data\.tags\): row 2 has no tag"),
        ({"tokens": ["secret"], "tags": ["secret"]}, r"\(data\.tags\): row 2 has a label that is not among the 2 names"),
    ],
)
def test_invalid_lists_are_rejected_with_their_place_and_without_their_content(tmp_path, row, message):
    rows = [{"tokens": ["a"], "tags": ["O"]}, row]
    with pytest.raises(UserError, match=message) as error:
        read(write(tmp_path / "rows.jsonl", rows), labels=["O", "B-X"])
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


def experiment(home, **more):
    """Tagging by three clients."""
    data = {"source": str(home / "train.jsonl"), "test": str(home / "test.jsonl")}
    clients = {"count": 3, "partition": "iid"}
    return build({"task": "tagging", "model": str(home / "model"), "data": data, "rounds": 1, "clients": clients, **more})


def tagged(model, tokenizer, file):
    """The metrics of a model from disk on the texts in a file, one at a time."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    predicted = []
    for row in rows:
        pieces = tokenizer(row["tokens"], is_split_into_words=True, return_tensors="pt")
        with torch.inference_mode():
            guessed = model.eval()(**pieces).logits[0].argmax(-1).tolist()
        words = pieces.word_ids(0)
        predicted.append([model.config.id2label[guessed[words.index(i)]] for i in range(len(row["tokens"]))])
    return expected([row["tags"] for row in rows], predicted)


@pytest.mark.slow
def test_the_exported_adapter_and_the_merged_model_reach_the_logged_metrics(home, tmp_path, monkeypatch):
    done = run(experiment(home, train={"lr": 0.02}, rounds=2), tmp_path / "run", False)
    found = {name: done.rows[-1].global_[name] for name in ("f1", "precision", "recall", "f1_macro")}
    monkeypatch.chdir(done.adapters[""])
    (code,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    export(tmp_path / "run", "merged", tmp_path / "merged")
    merged = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "merged")
    for model in (names["model"], merged):
        assert tagged(model, names["tokenizer"], home / "test.jsonl") == pytest.approx(found, rel=1e-6)
    assert done.rows[-1].global_["loss"] < done.rows[0].global_["loss"] and repr(done).startswith(
        "Result(fedit, 2 rounds, test f1"
    )


def test_one_client_learns_as_a_loop_with_peft(home, tmp_path):
    settings = {"optimizer": "sgd", "lr": 0.05, "batch_size": 60}
    clients = {"count": 1, "partition": "iid", "held_out": 0.0}
    given = experiment(home, clients=clients, train=settings, rounds=3, evaluate={"clients": "none"})
    losses = [row.train_loss for row in run(given, tmp_path / "run", False).rows[1:]]
    session = Session.make(given, FederatedData.make(given))
    start = RunState(session.method.init_server(session.adapted.spec, given.seed))
    folder = RunFolder.create(tmp_path / "start")
    write_exports(session, session.adapters(start, folder, 0), tmp_path / "adapter", "adapter")
    folder.release()
    model = peft.AutoPeftModelForTokenClassification.from_pretrained(
        tmp_path / "adapter", is_trainable=True, num_labels=len(BIO), ignore_mismatched_sizes=True
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "adapter")
    rows = [json.loads(line) for line in (home / "train.jsonl").read_text().splitlines()]
    inputs = tokenizer([row["tokens"] for row in rows], is_split_into_words=True, padding=True, return_tensors="pt")
    labels = torch.full_like(inputs["input_ids"], NO_TARGET)
    for i, row in enumerate(rows):
        words = inputs.word_ids(i)
        for word, tag in enumerate(row["tags"]):
            labels[i, words.index(word)] = BIO.index(tag)
    optimizer, expected_losses = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05), []
    for _ in range(3):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected_losses.append(float(loss.detach()))
    assert losses == pytest.approx(expected_losses, rel=1e-5) and losses[-1] < losses[0]


@pytest.mark.slow
def test_the_number_of_passes_of_a_step_changes_results_only_by_rounding(home, tmp_path):
    found = [
        run(experiment(home, train={"activation_memory_mb": mb}), tmp_path / str(mb), False).rows[-1] for mb in (256, 1)
    ]
    assert found[0].train_loss == pytest.approx(found[1].train_loss, rel=1e-5)
    assert found[0].global_["loss"] == pytest.approx(found[1].global_["loss"], rel=1e-5)
    assert found[0].clients["loss"].each == pytest.approx(found[1].clients["loss"].each, rel=1e-4)


def test_tagging_is_packed_and_trains_its_clients_in_one_step(home):
    session = Session.make(given := experiment(home), FederatedData.make(given))
    assert session.adapted.packing.works and not session.adapted.packing.narrows
    assert session.trainer.clients_per_step == given.train.clients_per_step


@pytest.mark.slow
def test_a_resumed_run_of_tagging_ends_as_an_uninterrupted_one(home, tmp_path):
    whole = run(experiment(home, rounds=2), tmp_path / "whole", False)
    run(experiment(home), tmp_path / "parts", False)
    parts = resume(tmp_path / "parts", False, ["rounds=2"])
    assert parts.rows[-1].global_ == whole.rows[-1].global_ and parts.rows[-1].clients == whole.rows[-1].clients


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "distilbert"])
def test_other_architectures_learn_tags(home, tmp_path, architecture):
    sizes = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
        "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48},
    }
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.AutoConfig.for_model(
        architecture, vocab_size=97, pad_token_id=0, **sizes.get(architecture, shape)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "model")
    words = transformers.AutoTokenizer.from_pretrained(home / "model").backend_tokenizer
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "bos_token": "[CLS]", "eos_token": "[SEP]"}
    kept = ["input_ids", "attention_mask"]
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_input_names=kept, **names).save_pretrained(
        tmp_path / "model"
    )
    what = {"model": str(tmp_path / "model"), "train": {"lr": 0.01, "epochs": 4}, "lora": {"targets": "all-linear"}}
    first, last = run(experiment(home, **what), tmp_path / "run", False).rows
    assert last.global_["loss"] < first.global_["loss"]


@pytest.mark.slow
def test_tags_are_learned_in_bf16(home, tmp_path):
    training = {"lr": 0.01, "epochs": 4, "precision": "bf16"}
    first, last = run(
        experiment(home, train=training, task={"kind": "tagging", "all_subwords": True}), tmp_path, False
    ).rows
    assert last.global_["loss"] < first.global_["loss"]


def test_partitions_by_class_are_rejected(home):
    with pytest.raises(UserError, match="'iid', 'clusters', 'length' or 'natural'"):
        FederatedData.make(experiment(home, clients={"count": 3}))
