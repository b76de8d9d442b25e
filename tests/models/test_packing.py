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
from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.classification import Classification
from fedlora.tasks.task import Examples
from fedlora.train.batched import train_together
from fedlora.train.evaluate import score
from fedlora.train.features import try_packing
from tiny_lm import pair, tiny_lm

from tiny import LABELS, tiny_bert, tiny_rows

TASK = Classification()
LENGTHS = torch.tensor([[5, 30], [11, 0]])
FIRST = (torch.arange(30) == 0).expand(4, 30)
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
NARROWS = {"bert", "roberta", "distilbert"}  # their heads read the first token alone
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


def outputs_in(packing: Packing, model: nn.Module) -> torch.Tensor:
    with packing.of(LENGTHS, torch.device("cpu"), FIRST):
        return outputs(model)


@pytest.mark.parametrize("name", PACKS)
def test_a_model_gives_the_same_packed_and_computes_no_padding(name):
    model = model_of(PACKS[name])
    packing, seen = Packing(model), []
    with torch.inference_mode():
        padded = outputs(model)
        packing.try_out(lambda: outputs_in(packing, model), 1e-5)
        assert packing.works and packing.narrows == (name in NARROWS)
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.in_features == 48:  # the last one of each block
                module.register_forward_hook(lambda _module, _args, output: seen.append(output.shape[:-1].numel()))
        with packing.of(LENGTHS, padded.device, FIRST) as layout:
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
        packing.try_out(lambda: outputs_in(packing, model), 0.1)
        assert packing.works and not packing.narrows
        with packing.of(LENGTHS, padded.device, FIRST):
            assert_close(outputs(model), padded, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PADS)
def test_a_model_that_cannot_be_packed_is_seen_and_stays_padded(name):
    model = model_of(PADS[name])
    packing = Packing(model)
    with torch.inference_mode():
        before = outputs(model)
        packing.try_out(lambda: outputs_in(packing, model), 1e-5)
        assert not packing.works
        with packing.of(LENGTHS, before.device) as layout:
            assert layout is None
            assert_close(outputs(model), before, rtol=0, atol=0)


def test_a_call_that_fails_inside_the_blocks_leaves_nothing_behind():
    model = model_of(PACKS["bert"])
    packing = Packing(model)
    with torch.inference_mode():
        expected = outputs(model)
        packing.try_out(lambda: outputs_in(packing, model), 1e-5)
        failing = model.bert.encoder.layer[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            outputs_in(packing, model)
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


DECODERS: dict[str, dict[str, Any]] = {
    "llama": {**BLOCKS, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "opt": {**SMALL, "num_hidden_layers": 2, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": BLOCKS,  # its blocks compute attention and the rest side by side
    "gemma": {**GROUPED, "head_dim": 8},
}


@pytest.mark.parametrize("kind", DECODERS)
def test_the_last_block_of_a_language_model_computes_only_the_tokens_that_are_read(kind):
    config = transformers.AutoConfig.for_model(kind, **{**DECODERS[kind], "vocab_size": 50, "pad_token_id": 0})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    packing, ids, seen = Packing(model), inputs()["input_ids"], []
    read = torch.rand(4, 30, generator=torch.Generator().manual_seed(0)) < 0.2
    real = torch.arange(30) < LENGTHS.view(4, 1)

    def logits() -> torch.Tensor:
        with packing.of(LENGTHS, torch.device("cpu"), read):
            found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
        return found[read & real]

    with torch.inference_mode():
        padded = logits()
        packing.try_out(logits, 1e-5)
        assert packing.works and packing.narrows
        for module in [*packing._blocks[-1].modules()][1:]:
            module.register_forward_hook(lambda _module, args, _output: seen.extend(x.shape for x in args[:1]))
        assert_close(logits(), padded, rtol=1e-5, atol=1e-6)
    assert seen[-1].numel() == int((read & real).sum()) * seen[-1][-1] < 46 * seen[-1][-1]


def test_a_language_model_learns_the_same_from_the_tokens_with_targets_as_from_all(tmp_path):
    task = CausalLM()
    model, tokenizer, _ = task.load(str(tiny_lm(tmp_path / "llama", attention_dropout=0.1)), (), 0)
    adapted = AdaptedModel(model, Scaling(16.0), "all-linear", dropout=0.1, head=norm_modules(model, ()))
    try_packing(adapted, task, tokenizer, 64)
    assert adapted.packing.works and adapted.packing.narrows
    pairs = [pair(i) for i in range(44)]
    examples = task.encode(tokenizer, {"prompt": [p for p, _ in pairs], "response": [r for _, r in pairs]}, 64)
    settings, found = Train(batch_size=4, lr=0.1, optimizer="sgd"), []
    for packed, narrow in ((True, True), (True, False), (False, False)):
        adapted.packing.works, adapted.packing.narrows = packed, narrow
        some = jobs(adapted)
        trained = train_together(adapted, task, examples, some, settings, 100_000)
        asked = [(job.rows, one.adapter) for job, one in zip(some, trained, strict=True)]
        losses = [task.metrics(one)["loss"] for one in score(adapted, task, examples, asked, 16)]
        found.append(([pack(one.adapter) for one in trained], losses))
    for adapters, losses in found[:2]:
        assert_close(adapters, found[2][0], rtol=1e-4, atol=1e-5)
        assert losses == pytest.approx(found[2][1], rel=1e-5)


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


def test_the_tokens_that_are_read_have_a_layout_of_their_own():
    chosen = torch.tensor([[1, 1], [0, 4], [2, 0], [2, 10], [3, 1], [4, 0]])  # of a filler row, and beyond a row's end, too
    read = torch.zeros(6, 11, dtype=torch.bool)
    read[chosen[:, 0], chosen[:, 1]] = True
    layout = Layout.of(torch.tensor([[0, 5], [11, 2], [0, 0]]), torch.device("cpu"), read)
    whole = torch.arange(1.0, 19)[None, :, None]
    narrow = layout.read
    assert narrow is not None and narrow.packed == (1, 4) and narrow.by_client == (3, 3)
    found = layout.select_read(whole)
    assert found.flatten().tolist() == [2, 6, 16, 18]
    assert_close(narrow.unpack(found), layout.unpack(whole).where(read[..., None], 0))
    assert_close(narrow.pack(layout.unpack(whole)), found)
    assert narrow.to_client_axis(found)[..., 0].tolist() == [[2, 0, 0], [6, 16, 18], [0, 0, 0]]
    assert_close(narrow.from_client_axis(narrow.to_client_axis(found)), found)


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
