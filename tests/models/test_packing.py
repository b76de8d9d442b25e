"""Examples one after the other give what padded ones give."""

import os
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.testing import assert_close

from batched_jobs import jobs, routed, session  # noqa: F401  (a fixture)
from fedlora.adapter import pack
from fedlora.config.sections import Train
from fedlora.data.files import columns
from fedlora.models.adapted import AdaptedModel, Scaling
from fedlora.models.layout import Layout
from fedlora.models.packing import Packing
from fedlora.models.targets import norm_modules
from fedlora.tasks.classification import Classification
from fedlora.tasks.task import Examples
from fedlora.train.batched import train_together
from fedlora.train.evaluate import score
from fedlora.train.features import try_packing

from tiny import LABELS, tiny_bert, tiny_rows

TASK = Classification()
LENGTHS = torch.tensor([[5, 30], [11, 0]])
SMALL = {"vocab_size": 50, "num_labels": 3, "pad_token_id": 0, "hidden_size": 32, "num_attention_heads": 4}
BLOCKS = {**SMALL, "num_hidden_layers": 2, "intermediate_size": 48}
GROUPED = {**BLOCKS, "num_key_value_heads": 2}
PACKS: dict[str, Any] = {
    "bert": transformers.BertConfig(**BLOCKS),
    "roberta": transformers.RobertaConfig(**BLOCKS, max_position_embeddings=40),
    "distilbert": transformers.DistilBertConfig(
        vocab_size=50, num_labels=3, pad_token_id=0, dim=32, n_layers=2, n_heads=4, hidden_dim=48
    ),
    "opt": transformers.OPTConfig(
        **SMALL, num_hidden_layers=2, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=40
    ),
    "llama, groups of heads and rotations": transformers.LlamaConfig(**GROUPED),
    "mistral, a window of 8 tokens": transformers.MistralConfig(**GROUPED, sliding_window=8),
}
NARROWS = {"bert", "roberta"}  # their blocks add up in modules of their own
PADS: dict[str, Any] = {
    "albert, one block for all layers": transformers.AlbertConfig(**BLOCKS, embedding_size=16),
    "deberta, positions in its attention": transformers.DebertaV2Config(**BLOCKS),
    "gemma 2, attention of its own": transformers.Gemma2Config(**GROUPED, head_dim=8),
}


def model_of(config: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = transformers.AutoModelForSequenceClassification.from_config(config)
    return model.eval()


def inputs() -> dict[str, torch.Tensor]:
    """Two clients' rows; the last one is a filler, which the model sees and the layout does not have."""
    mask = (torch.arange(30) < torch.tensor([5, 30, 11, 4])[:, None]).long()
    ids = torch.randint(3, 50, mask.shape, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids * mask, "attention_mask": mask}


def outputs(model: nn.Module) -> torch.Tensor:
    """Features and logits [3, width]."""
    return torch.cat([TASK.features(model, inputs()), model(**inputs()).logits], 1)[:3]


@pytest.mark.parametrize("name", PACKS)
def test_a_model_gives_the_same_packed_and_computes_no_padding(name):
    model = model_of(PACKS[name])
    packing, seen = Packing(model), []
    with torch.inference_mode():
        padded = outputs(model)
        packing.try_out(lambda: outputs(model), LENGTHS, 1e-5)
        assert packing.works and packing.narrows == (name in NARROWS)
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.in_features == 48:  # the last one of each block
                module.register_forward_hook(lambda _module, _args, output: seen.append(output.shape[:-1].numel()))
        with packing.of(LENGTHS, padded.device) as layout:
            assert layout is not None
            packed = outputs(model)
        assert_close(outputs(model), padded, rtol=0, atol=0)
    assert_close(packed, padded, rtol=1e-5, atol=1e-6)
    last = 3 if name in NARROWS else 46
    assert seen[: len(seen) // 2] in ([46, last], [46, last] * 2)


def test_a_head_that_reads_other_tokens_too_gets_all_of_them():
    class OfTheMean(nn.Module):
        """Pools as some models do."""

        def __init__(self, bert: nn.Module) -> None:
            super().__init__()
            self.base_model, self.head = bert, nn.Linear(32, 3)

        def forward(self, **given: torch.Tensor) -> Any:
            shown = given["attention_mask"][..., None]
            seen = self.base_model(**given).last_hidden_state * shown
            return transformers.modeling_outputs.SequenceClassifierOutput(logits=self.head(seen.sum(1) / shown.sum(1)))

    model = OfTheMean(model_of(PACKS["bert"]).base_model).eval()
    model.head.weight.data *= 1e-6  # which nobody would notice among the features
    packing = Packing(model)
    with torch.inference_mode():
        padded = outputs(model)
        packing.try_out(lambda: outputs(model), LENGTHS, 0.1)
        assert packing.works and not packing.narrows
        with packing.of(LENGTHS, padded.device):
            assert_close(outputs(model), padded, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PADS)
def test_a_model_that_cannot_be_packed_is_seen_and_stays_padded(name):
    model = model_of(PADS[name])
    packing = Packing(model)
    with torch.inference_mode():
        before = outputs(model)
        packing.try_out(lambda: outputs(model), LENGTHS, 1e-5)
        assert not packing.works
        with packing.of(LENGTHS, before.device) as layout:
            assert layout is None
            assert_close(outputs(model), before, rtol=0, atol=0)


def test_a_call_that_fails_inside_the_blocks_leaves_nothing_behind():
    model = model_of(PACKS["bert"])
    packing = Packing(model)
    with torch.inference_mode():
        expected = outputs(model)
        packing.try_out(lambda: outputs(model), LENGTHS, 1e-5)
        failing = model.bert.encoder.layer[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), packing.of(LENGTHS, expected.device):
            outputs(model)
        failing.remove()
        assert packing.inside is None
        assert_close(outputs(model), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("experts", "dropout", "tokens"), [(False, 0.0, 1), (False, 0.1, 100_000), (True, 0.1, 100_000)])
def test_training_and_evaluation_give_the_same_packed(session, experts, dropout, tokens):  # noqa: F811
    adapted, examples = session
    some = jobs(adapted)
    some = [routed(job, 2, i) for i, job in enumerate(some)] if experts else some
    settings = Train(batch_size=4, lr=0.1, optimizer="sgd")
    attention = [m for m in adapted.model.modules() if hasattr(m, "attention_head_size")]
    assert attention and adapted.packing.works and adapted.packing.narrows
    found = []
    for works in (True, False):
        adapted.packing.works = works
        for module in attention:
            module.dropout.p = dropout
        try:
            trained = train_together(adapted, TASK, examples, some, settings, tokens)
        finally:
            adapted.packing.works = True
            for module in attention:
                module.dropout.p = 0.1
        found.append(trained)
    for packed, padded in zip(*found, strict=True):
        assert packed.loss == pytest.approx(padded.loss, rel=1e-5)
        assert_close(pack(packed.adapter), pack(padded.adapter), rtol=1e-4, atol=1e-5)
    assert_close(evaluated(adapted, examples, some, True), evaluated(adapted, examples, some, False), rtol=1e-4, atol=1e-6)


def test_what_is_trained_after_the_last_attention_learns_the_same_from_the_first_tokens(tmp_path):
    model, tokenizer, _ = TASK.load(str(tiny_bert(tmp_path / "model")), LABELS, seed=0)
    table = columns(tiny_rows(tmp_path / "rows.jsonl", 44), "data.source")
    table["label"] = [LABELS.index(label) for label in table["label"]]
    norms = norm_modules(model, ["classifier"])
    adapted = AdaptedModel(model, Scaling(16.0), "all-linear", dropout=0.1, head=["classifier", *norms])
    try_packing(adapted, TASK, tokenizer, 64)
    assert adapted.packing.narrows and any("output.dense" in name for name in adapted.layers)
    examples, some = TASK.encode(tokenizer, table, 64), jobs(adapted)
    assert any("LayerNorm" in name for name in some[0].request.start)
    settings, found = Train(batch_size=4, lr=0.1, optimizer="sgd"), []
    for adapted.packing.works in (True, False):
        found.append(train_together(adapted, TASK, examples, some, settings, 100_000))
    for packed, padded in zip(*found, strict=True):
        assert packed.loss == pytest.approx(padded.loss, rel=1e-5)
        assert_close(pack(packed.adapter), pack(padded.adapter), rtol=1e-4, atol=1e-5)


def evaluated(adapted: AdaptedModel, examples: Examples, some: Any, works: bool) -> list[float]:
    adapted.packing.works = works
    try:
        asked = [(job.rows, job.request.start) for job in some]
        return [TASK.metrics(each)["loss"] for each in score(adapted, TASK, examples, asked, 16)]
    finally:
        adapted.packing.works = True


def test_clients_that_are_evaluated_on_long_examples_only_may_have_fewer_than_others(session):  # noqa: F811
    adapted, examples = session
    ranked = examples.lengths().argsort()
    asked = [(rows, job.request.start) for rows, job in zip((ranked[:20], ranked[-2:]), jobs(adapted), strict=False)]
    together = score(adapted, TASK, examples, asked, 8)
    alone = [score(adapted, TASK, examples, [one], 8)[0] for one in asked]
    for ours, theirs in zip(together, alone, strict=True):
        assert TASK.metrics(ours) == pytest.approx(TASK.metrics(theirs), rel=1e-5)


def test_the_first_tokens_have_a_layout_of_their_own():
    layout = Layout.of(torch.tensor([[0, 5], [11, 2], [0, 0]]), torch.device("cpu"))
    whole = torch.arange(1.0, 19)[None, :, None]
    first = layout.first
    assert first is not None and first.packed == (1, 3) and first.by_client == (3, 2)
    narrow = whole[:, layout.at_first]
    assert narrow.flatten().tolist() == [1, 6, 17]
    assert_close(first.unpack(narrow)[:, 0], layout.unpack(whole)[:, 0])
    assert_close(first.pack(layout.unpack(whole)), narrow)
    assert first.to_client_axis(narrow)[..., 0].tolist() == [[1, 0], [6, 17], [0, 0]]
    assert_close(first.from_client_axis(first.to_client_axis(narrow)), narrow)


def test_the_forms_of_a_layout_hold_the_same_tokens_and_gradients():
    layout = Layout.of(LENGTHS, torch.device("cpu"))
    assert (layout.packed, layout.padded, layout.by_client) == ((1, 46), (4, 30), (2, 35))
    assert [(bucket.rows.tolist(), bucket.longest) for bucket in layout.buckets] == [([1], 30), ([2], 11), ([0], 5)]
    x = torch.arange(1.0, 93).view(1, 46, 2).double().requires_grad_()
    heads = x.unflatten(2, (2, 1)).transpose(1, 2)  # [1, heads, tokens, 1]
    assert_close(layout.pack(layout.unpack(x)), x)
    assert_close(layout.from_client_axis(layout.to_client_axis(x)), x)
    assert_close(layout.join(layout.split(heads)), heads)
    assert_close(layout.unpack(x)[2, :11], x[0, 35:])
    assert not layout.unpack(x)[2, 11:].any() and not layout.unpack(x)[3].any()
    for form in (
        lambda x: layout.pack(layout.unpack(x)),
        layout.to_client_axis,
        lambda x: layout.join(layout.split(x[:, None])),
    ):
        assert torch.autograd.gradcheck(form, (x,))


def test_kernel_caches_are_limited_unless_the_user_has_chosen_their_size(monkeypatch):
    keys = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    for chosen, expected in ((None, "64"), ("7", "7")):
        for key in keys:
            monkeypatch.setenv(key, chosen or "")
            if chosen is None:
                monkeypatch.delenv(key)
        Packing(nn.Linear(1, 1))
        assert [os.environ[key] for key in keys] == [expected, expected]
