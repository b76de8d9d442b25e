"""Models in which clients that are trained in one step get what each gets alone, and others."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.adapter import Adapter, Scaling, lora_init, pack
from fedlora.api import run
from fedlora.config.experiment import build
from fedlora.config.sections import Train
from fedlora.data.files import columns
from fedlora.errors import UserError
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import Fit
from fedlora.models.adapted import AdaptedModel
from fedlora.models.targets import head_modules
from fedlora.parts.dense import Dense
from fedlora.rounds.progress import NullProgress
from fedlora.tasks.classification import Classification
from fedlora.tasks.task import Examples
from fedlora.train.batched import train_together
from fedlora.train.evaluate import score
from fedlora.train.features import try_packing
from fedlora.train.independence import safe_clients_per_step
from fedlora.train.job import Job
from tiers import fast

from architectures import CONFIGS, model_of, tokenizer_of
from tiny import LABELS, tiny_rows
from wired import furnish, problem

ROWS = [torch.arange(0, 9), torch.arange(9, 15), torch.arange(15, 16), torch.arange(16, 20)]
ORDINARY = ("bert", "roberta", "distilbert", "electra", "gpt2", "llama", "mistral", "qwen2", "opt", "modernbert")
QUICK = ("bert", "llama", "mistral", "opt", "deberta-v2", "xlnet")
REFUSED = ("reformer",)
"""Wants examples of one length."""
COARSE = ("bloom", "flaubert", "gpt_neo", "gptj", "xlm")
"""Compute some of their attention in fp32, whatever the model is in."""


class Exact(Classification):
    """With losses in the precision of the model."""

    def losses(self, model: nn.Module, inputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        found = functional.cross_entropy(model(**inputs).logits, targets, reduction="none")
        return found, torch.ones_like(found)


def adapted_of(kind: str, dtype: torch.dtype, targets: str | None = "all-linear") -> AdaptedModel:
    model = model_of(kind, torch.float32 if dtype == torch.bfloat16 else dtype)
    adapted = AdaptedModel(model, Scaling(16.0), targets, 0.1, head=head_modules(model, ()), precision=dtype)
    try_packing(adapted, Classification(), tokenizer_of(kind), 64)
    return adapted


def examples_of(kind: str, folder: Any) -> Examples:
    table = columns(tiny_rows(folder / "rows.jsonl", 20), "data.source")
    table["label"] = [LABELS.index(label) for label in table["label"]]
    return Classification().encode(tokenizer_of(kind), table, 64)


def jobs(adapted: AdaptedModel) -> list[Job]:
    """Clients of different ranks, heads and numbers of rows, in fp64."""
    found = []
    for i, rows in enumerate(ROWS):
        rng, start = torch.Generator().manual_seed(i), dict[str, Any]()
        for name, part in lora_init(adapted.spec, 1 + i, i).items():
            start[name] = LowRank(torch.randn(part.b.shape, generator=rng).double() / 9, part.a.double())
        head: Adapter = {name: Dense(w + 0.01 * i) for name, w in adapted.spec.head.items()}
        found.append(Job(Fit({**start, **head}, frozenset("baw")), rows, seed=i, shared_order_seed=7))
    return found


@pytest.mark.parametrize("kind", fast(CONFIGS, *QUICK))
def test_clients_get_together_what_each_gets_alone_or_are_not_trained_together(kind, tmp_path):
    """Unequal ranks, rows and lengths, dropout in the model and the LoRA layers, three steps, and evaluation."""
    adapted, task = adapted_of(kind, torch.float64), Exact()
    try:
        most = safe_clients_per_step(adapted, task, tokenizer_of(kind), 4, 128)
    except UserError as error:
        assert kind in REFUSED and f"type {kind!r} cannot be trained: " in str(error) and "\n" not in str(error)
        return
    assert most == 4 or (most == 1 and kind not in ORDINARY)
    examples, some = examples_of(kind, tmp_path), jobs(adapted)
    settings = Train(batch_size=3, lr=0.05, optimizer="sgd")
    groups = [some[i : i + most] for i in range(0, len(some), most)]
    together = [one for group in groups for one in train_together(adapted, task, examples, group, settings, 1000)]
    evaluated = [
        one for group in groups for one in score(adapted, task, examples, [(j.rows, j.request.start) for j in group], 64)
    ]
    for job, ours, seen in zip(some, together, evaluated, strict=True):
        (alone,) = train_together(adapted, task, examples, [job], settings, 1000)
        (single,) = score(adapted, task, examples, [(job.rows, job.request.start)], 64)
        assert task.metrics(seen)["loss"] == pytest.approx(task.metrics(single)["loss"], rel=1e-5)
        start, found, expected = (pack(adapter) for adapter in (job.request.start, ours.adapter, alone.adapter))
        moved = sum(float((x - start[key]).square().sum()) for key, x in expected.items()) ** 0.5
        apart = sum(float((x - found[key]).square().sum()) for key, x in expected.items()) ** 0.5
        assert moved > 0 and apart <= (1e-5 if kind in COARSE else 1e-10) * moved


@pytest.mark.parametrize("precision", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", fast(ORDINARY, "bert", "llama"))
def test_ordinary_models_train_clients_together_without_padding(kind, precision):
    adapted = adapted_of(kind, precision)
    assert safe_clients_per_step(adapted, Classification(), tokenizer_of(kind), 9, 128) == 9
    assert adapted.packing.works
    assert all(layer.part is None for layer in adapted.layers.values())  # the model is as it was


@pytest.mark.parametrize(("precision", "packed"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)])
def test_a_weak_influence_of_other_clients_is_found(precision, packed):
    adapted = adapted_of("bert", precision)
    adapted.packing.works = adapted.packing.works and packed
    hook = adapted.model.bert.encoder.layer[0].intermediate.register_forward_hook(
        lambda _module, _args, y: y + 0.3 * y.roll(1, 1 if y.shape[0] == 1 else 0)
    )
    assert safe_clients_per_step(adapted, Classification(), tokenizer_of("bert"), 4, 128) == 1
    hook.remove()
    assert safe_clients_per_step(adapted, Classification(), tokenizer_of("bert"), 4, 128) == 4


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", fast(ORDINARY, "bert", "llama"))
def test_ordinary_models_keep_private_clients_apart(kind, precision):
    adapted = adapted_of(kind, precision)
    assert safe_clients_per_step(adapted, Classification(), tokenizer_of(kind), 4, 128, private=True) == 4
    assert adapted.packing.works


@pytest.mark.parametrize("packed", [True, False])
def test_for_privacy_an_influence_below_the_rounding_of_bf16_is_found(packed):
    adapted = adapted_of("bert", torch.bfloat16)
    adapted.packing.works = adapted.packing.works and packed
    hook = adapted.model.bert.encoder.layer[0].intermediate.register_forward_hook(
        lambda _module, _args, y: y + 0.01 * y.roll(1, 1 if y.shape[0] == 1 else 0)
    )

    def safe(private: bool) -> int:
        return safe_clients_per_step(adapted, Classification(), tokenizer_of("bert"), 4, 128, private)

    assert safe(private=True) == 1
    assert safe(private=False) == 4, "the influence is too weak for the test"
    hook.remove()
    assert safe(private=True) == 4


def test_a_model_that_cannot_be_trained_is_refused_in_one_line():
    adapted = adapted_of("bert", torch.float32)

    def fail(*_: Any) -> None:
        if adapted.model.training:
            raise RuntimeError("shapes differ\nand more")

    adapted.model.register_forward_pre_hook(fail)
    with pytest.raises(UserError, match=r"type 'bert' cannot be trained: RuntimeError: shapes differ$"):
        safe_clients_per_step(adapted, Classification(), tokenizer_of("bert"), 16, 128)


class Heard(NullProgress):
    """Remembers notifications."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def notify(self, message: str) -> None:
        self.lines.append(message)


def test_a_run_with_such_a_model_trains_clients_one_by_one_and_says_so(tmp_path):
    home, found = furnish(tmp_path), []
    model_of("deberta-v2").base_model.save_pretrained(home / "deberta")
    tokenizer_of("deberta-v2").save_pretrained(home / "deberta")
    for clients_per_step in (1, 4):
        table, heard = problem(home, rounds=1), Heard()
        table = {**table, "model": str(home / "deberta"), "train": {**table["train"], "clients_per_step": clients_per_step}}
        result = run(build(table), tmp_path / f"run{clients_per_step}", heard)
        environment = json.loads((result.folder / "environment.json").read_text())
        assert environment["clients_per_step"] == 1
        found.append((result.rows[-1].train_loss, [line for line in heard.lines if "one at a time" in line]))
    assert found[0][0] == found[1][0] and [len(lines) for _, lines in found] == [0, 1]
