# ruff: noqa: F811  (a fixture)
"""Blocks that are computed again in the backward pass, against stored activations."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from batched_jobs import TASK, jobs, session, unfactored, whole  # noqa: F401  (a fixture)
from fedlora.adapter import lora_init, pack
from fedlora.api import run
from fedlora.config.experiment import Experiment
from fedlora.config.sections import Train
from fedlora.errors import UserError
from fedlora.models.adapted import AdaptedModel, Scaling
from fedlora.models.layers import LoraLayer
from fedlora.tasks.task import Examples
from fedlora.train.batched import train_together
from fedlora.train.micro_batches import bytes_per_token
from fedlora.train.record_privacy import RecordPrivacy
from tiny_tasks import tiny_task

from architectures import model_of

Loaded = tuple[AdaptedModel, Examples]


@pytest.fixture
def checkpointed(session: Loaded) -> Any:
    """The session's model, with checkpointing during the test."""
    adapted = session[0]
    adapted.checkpointing.enable()
    yield adapted
    for block in adapted.checkpointing.blocks:
        block.gradient_checkpointing = False
    adapted.checkpointing.blocks = ()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("max_tokens", [60, 100_000])
def test_blocks_computed_again_have_the_gradients_of_stored_ones_to_the_bit(
    session, checkpointed, packed, max_tokens, monkeypatch
):
    """Clients of unequal ranks, rows and lengths in one step, dropout in the model and the LoRA layers."""
    adapted, examples = session
    assert adapted.packing.works and adapted.packing.narrows
    monkeypatch.setattr(adapted.packing, "works", packed)
    calls, settings = [0], Train(batch_size=4, lr=0.1, optimizer="sgd", epochs=2)
    for layer in adapted.layers.values():
        layer.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    with checkpointed.checkpointing.disabled():
        stored = train_together(adapted, TASK, examples, jobs(adapted), settings, max_tokens)
    once = calls[0]
    again = train_together(adapted, TASK, examples, jobs(adapted), settings, max_tokens)
    assert calls[0] - once == 2 * once
    for one, other in zip(again, stored, strict=True):
        assert one.loss == other.loss
        found, expected = pack(one.adapter), pack(other.adapter)
        assert all(torch.equal(found[key], x) for key, x in expected.items())


def test_so_have_private_examples_weights(session, checkpointed):
    """Their gradients are kept as products of the tokens of blocks that are computed again."""
    adapted, examples = session
    privacy = RecordPrivacy(clip=0.3, noise_multiplier=0.5, rate=0.4, steps=100)
    some = [replace(unfactored(job), privacy=privacy) for job in jobs(adapted)]
    settings, found = Train(batch_size=4, lr=0.1, optimizer="sgd", max_steps=3), []
    with checkpointed.checkpointing.disabled():
        found.append(train_together(adapted, TASK, examples, some, settings, 1000))
    found.append(train_together(adapted, TASK, examples, some, settings, 1000))
    for one, other in zip(*found, strict=True):
        ours, expected = pack(one.adapter), pack(other.adapter)
        assert all(torch.equal(ours[key], x) for key, x in expected.items())


@pytest.mark.parametrize("private", [False, True])
def test_so_has_a_model_that_is_trained_in_its_places(whole, private):
    adapted, examples, job = whole
    privacy = RecordPrivacy(clip=0.3, noise_multiplier=0.5, rate=0.4, steps=100) if private else None
    some, settings = [replace(job, privacy=privacy)], Train(batch_size=4, lr=0.1, optimizer="sgd", max_steps=2)
    adapted.checkpointing.enable()
    with adapted.checkpointing.disabled():
        (stored,) = train_together(adapted, TASK, examples, some, settings, 1000)
    (again,) = train_together(adapted, TASK, examples, some, settings, 1000)
    found, expected = pack(again.adapter), pack(stored.adapter)
    assert all(torch.equal(found[key], x) for key, x in expected.items())


@pytest.mark.parametrize("task", ["causal-lm", "seq2seq", "image-classification"])
def test_a_run_with_checkpointing_has_the_results_of_one_without(task, tmp_path):
    given = tiny_task(task, tmp_path / "task")
    settings = {"rounds": 1, "clients": {"count": 2, "partition": "iid"}, "evaluate": {"before": False}, **given}
    found = []
    for checkpointing in (False, True):
        table = {**settings, "train": {"max_steps": 2, "max_length": 24, "gradient_checkpointing": checkpointing}}
        found.append(run(Experiment.model_validate(table), tmp_path / f"run {checkpointing}").rows[-1])
    assert found[0].train_loss == found[1].train_loss and found[0].global_ == found[1].global_


def test_a_pass_of_a_deep_model_stores_less_and_has_room_for_more_tokens(session):
    config = transformers.BertConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=8, num_attention_heads=2, intermediate_size=64, num_labels=3
    )
    adapted = AdaptedModel(transformers.BertForSequenceClassification(config), Scaling(16.0), head=["classifier"])
    start = lora_init(adapted.spec, 4, 0)
    stored = bytes_per_token(adapted, TASK, session[1], start)
    adapted.checkpointing.enable()
    assert bytes_per_token(adapted, TASK, session[1], start) < stored / 3


def test_a_model_without_checkpointing_is_refused_in_one_line():
    adapted = AdaptedModel(model_of("xlm"), Scaling(16.0), ["q_lin"])
    with pytest.raises(
        UserError, match=r"^train.gradient_checkpointing is not supported by models of type 'xlm'; .*false$"
    ):
        adapted.checkpointing.enable()


def test_layers_of_a_model_in_evaluation_are_computed_once(session, checkpointed):
    adapted, examples = session
    adapted.load_clients([])
    inputs, _ = examples.batch(torch.arange(2), torch.device("cpu"))
    layer, calls = next(m for m in adapted.model.modules() if isinstance(m, LoraLayer)), list[int]()
    layer.register_forward_hook(lambda *_: calls.append(1))
    adapted.model.eval()(**inputs)
    assert len(calls) == 1
