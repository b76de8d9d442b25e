"""Attention computed step by step, for dropout, against torch's own."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from fedlora.models.attention import Attention
from fedlora.models.dropout import ClientDropout
from fedlora.models.packing import Packing

SHOWN = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.5
SHOWN[0, 0, 2], SHOWN[1, 0, 5] = False, False  # two queries without any key


def filled(value: float) -> Tensor:
    return torch.zeros(SHOWN.shape, dtype=torch.float64).masked_fill(~SHOWN, value)


def inputs() -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(2, heads, 6, 8, generator=rng, dtype=torch.float64).requires_grad_() for heads in (4, 2, 2)]


@pytest.mark.parametrize(
    "mask",
    [SHOWN, filled(float("-inf")), filled(torch.finfo(torch.float64).min), None],
    ids=["bool", "infinite", "finite", "none"],
)
@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_weights_give_what_torchs_attention_gives_also_for_queries_without_keys(mask, backend):
    found: list[tuple[Tensor, ...]] = []
    for open_ in (True, False):
        query, key, value = inputs()
        call = Attention(query, key, value, mask, is_causal=mask is None, enable_gqa=True)
        with sdpa_kernel([backend, SDPBackend.MATH]):
            y = call.weighted(call.weights()) if open_ else scaled_dot_product_attention(*call[:6], enable_gqa=True)
        y.square().sum().backward()
        found.append((y, query.grad, key.grad, value.grad))
    if mask is SHOWN:
        assert not found[0][0][0, :, 2].any() and not found[0][0][1, :, 5].any()
    # torch's fused kernel has another gradient than its own definition where a finite mask hides all keys
    compared = 1 if backend != SDPBackend.MATH and mask is not None and mask.dtype != torch.bool else 4
    assert_close(found[0][:compared], found[1][:compared])


WINDOWED: dict[str, Any] = {
    "mistral": transformers.MistralConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        sliding_window=4,
        attention_dropout=0.1,
        pad_token_id=0,
    ),
    "modernbert": transformers.ModernBertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=48,
        local_attention=8,
        attention_dropout=0.1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        cls_token_id=1,
        sep_token_id=2,
    ),
}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", WINDOWED)
def test_padding_beyond_the_window_leaves_losses_and_gradients_finite_and_unchanged(kind, packed):
    """An example of 30 tokens beside one of 40, which is padded further than it sees, gets what it gets alone."""
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(WINDOWED[kind]).double().train()
    packing = Packing(model)
    packing.works = packed
    ids = torch.randint(3, 50, (2, 40))
    found = []
    for lengths in ([30, 40], [30]):
        tokens = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        model.zero_grad()
        with ClientDropout(packing) as chance, packing.of(torch.tensor(lengths)[:, None], torch.device("cpu")):
            sizes = [(length, 1) for length in lengths]
            chance.next_pass([torch.Generator().manual_seed(i) for i in range(len(lengths))], sizes)
            padded = ids[: len(lengths), : max(lengths)] * tokens
            logits = model(input_ids=padded, attention_mask=tokens.long()).logits[0]
        logits.square().sum().backward()
        found.append([logits, *(p.grad for p in model.parameters())])
    assert_close(found[0], found[1])
