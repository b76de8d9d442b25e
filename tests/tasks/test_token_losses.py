"""Losses at the targets alone against the model's own, of all positions."""

import math

import pytest
import torch
import transformers
from torch.nn import functional
from torch.testing import assert_close

from fedlora.tasks import token_losses as module
from fedlora.tasks.seq2seq import Seq2Seq
from fedlora.tasks.task import NO_TARGET
from fedlora.tasks.token_losses import token_losses
from tiny_lm import CONFIGS

_LLAMA = {**CONFIGS["llama"], "head_dim": 8}
KINDS = {
    **CONFIGS,
    "gemma2": {**_LLAMA, "final_logit_softcapping": 0.5, "initializer_range": 0.3},
    "cohere": {**CONFIGS["llama"], "logit_scale": 0.3},
    "granite": {**CONFIGS["llama"], "logits_scaling": 0.2},
    "gpt_neox": {k: v for k, v in CONFIGS["llama"].items() if k != "num_key_value_heads"},
    "opt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 16},
}


_BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
SEQ2SEQ = {
    "t5": {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 48, "d_kv": 8, "dropout_rate": 0.0},
    "t5, scaled": {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 48, "d_kv": 8, "scale_decoder_outputs": True},
    **dict.fromkeys(("bart", "mbart", "m2m_100", "blenderbot"), _BART),
}


def seq2seq_of(kind):
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    ids = {"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 1}
    config = transformers.AutoConfig.for_model(kind.partition(",")[0], vocab_size=90, **ids, **heads, **SEQ2SEQ[kind])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForSeq2SeqLM.from_config(config).eval()


def model_of(kind):
    config = transformers.AutoConfig.for_model(kind, vocab_size=90, pad_token_id=0, **KINDS[kind])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def batch():
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 90, (4, 9), generator=rng)
    inside = torch.arange(9) < torch.tensor([9, 5, 7, 2])[:, None]
    learned = (torch.rand(4, 9, generator=rng) < 0.5) & inside & inside.roll(-1, 1)
    learned[:, -1] = False
    targets = ids.roll(-1, 1).where(learned, NO_TARGET)
    targets[3] = NO_TARGET
    return {"input_ids": ids.where(inside, 0)}, targets


def own_losses(model, call, targets):
    """Those of all logits at once."""
    logits = model(**call, use_cache=False).logits.float()
    losses = functional.cross_entropy(logits.mT, targets, reduction="none")
    return losses, (logits.argmax(-1) == targets)


def counting(call, calls):
    def counted(*args):
        calls[0] += 1
        return call(*args)

    return counted


@pytest.mark.parametrize("logits", [1 << 24, 90 * 3, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_all_logits_at_once(kind, logits, monkeypatch):
    monkeypatch.setattr(module, "_LOGITS", logits)
    model, (inputs, targets) = model_of(kind), batch()
    parts = [0]
    monkeypatch.setattr(module._Losses, "apply", counting(module._Losses.apply, parts))
    weights = torch.linspace(0.5, 2, 4)  # a client's examples have other weights than those of other clients
    trained = next(p for n, p in model.named_parameters() if (n.endswith("weight") and "norm" in n) or "ln" in n)
    model.requires_grad_(False)
    trained.requires_grad_(True)
    found = []
    for compute in (own_losses, token_losses):
        losses, right = compute(model, inputs, targets)
        (gradient,) = torch.autograd.grad((losses.sum(1) * weights).sum(), trained)
        found.append((losses.detach(), right, gradient))
    assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert (found[1][0] > 0).equal(targets != NO_TARGET)
    rows = int((targets != NO_TARGET).sum())
    assert parts == [-(-rows // max(1, logits // 90))]


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_output_layer_that_is_trained_gets_its_gradient(kind):
    model, (inputs, targets) = model_of(kind), batch()
    model.requires_grad_(False)
    weight = model.get_output_embeddings().weight.requires_grad_(True)  # GPT-2's is that of the embeddings, too
    gradients = [
        torch.autograd.grad(compute(model, inputs, targets)[0].sum(), weight)[0] for compute in (own_losses, token_losses)
    ]
    assert_close(gradients[1], gradients[0])


def test_a_model_that_does_not_call_its_decoder_gets_all_logits(monkeypatch):
    model, original, (inputs, targets) = model_of("llama"), model_of("llama"), batch()
    expected = own_losses(model, inputs, targets)
    monkeypatch.setattr(model, "forward", lambda **given: original(**given))
    assert_close(token_losses(model, inputs, targets), expected)


def test_without_targets_there_is_no_loss():
    model, (inputs, targets) = model_of("llama"), batch()
    losses, right = token_losses(model, inputs, torch.full_like(targets, NO_TARGET))
    assert not losses.any() and not right.any() and losses.shape == targets.shape


def test_the_loss_of_uniform_logits_is_the_logarithm_of_the_vocabulary():
    model, (inputs, targets) = model_of("gpt2"), batch()
    torch.nn.init.zeros_(model.transformer.ln_f.weight)
    losses, _ = token_losses(model, inputs, targets)
    assert_close(losses[targets != NO_TARGET], torch.full((int((targets != NO_TARGET).sum()),), math.log(90)))


def test_the_model_is_left_as_it_was_also_after_an_error():
    model, (inputs, targets) = model_of("llama"), batch()
    before = model(**inputs).logits
    with pytest.raises(IndexError):
        token_losses(model, inputs, targets.where(targets == NO_TARGET, 10_000))
    assert "forward" not in vars(model.model) and torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("trained", ["the encoder", "the output layer"])
@pytest.mark.parametrize("logits", [1 << 24, 1])
@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_losses_and_gradients_of_an_encoder_decoder_are_those_of_all_logits(kind, logits, trained, monkeypatch):
    monkeypatch.setattr(module, "_LOGITS", logits)
    model, (inputs, targets) = seq2seq_of(kind), batch()
    call = {**inputs, "decoder_input_ids": inputs["input_ids"].roll(1, 1)}
    weight = (model.get_output_embeddings() if trained == "the output layer" else next(layers(model.get_encoder()))).weight
    model.requires_grad_(False)
    weight.requires_grad_(True)
    found, parts, encoded = [], [0], [0]
    monkeypatch.setattr(module._Losses, "apply", counting(module._Losses.apply, parts))
    model.get_encoder().register_forward_hook(counting(lambda *_: None, encoded))
    for compute in (own_losses, token_losses):
        losses, right = compute(model, call, targets)
        (gradient,) = torch.autograd.grad(losses.sum(), weight)
        found.append((losses.detach(), right, gradient))
    assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert encoded == [2] and (parts[0] > 0) == (trained == "the encoder")


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_the_decoder_reads_the_targets_as_the_model_itself_shifts_them(kind):
    model, (inputs, _) = seq2seq_of(kind), batch()
    targets = inputs["input_ids"].where(torch.arange(9) < torch.tensor([4, 9, 2, 7])[:, None], NO_TARGET)
    with torch.inference_mode():
        sums, counts = Seq2Seq().losses(model, inputs, targets)
        assert_close(sums.sum() / counts.sum(), model(**inputs, labels=targets).loss, rtol=1e-5, atol=1e-6)


def layers(stack):
    return (m for m in stack.modules() if isinstance(m, torch.nn.Linear))
