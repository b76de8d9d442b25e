"""LoRA files of llama.cpp: the file of the base model and the adapter's file make that of the merged model."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fedlora.adapter import Adapter
from fedlora.exporting.gguf_adapter import to_gguf_adapter, unfit_for_gguf_adapter
from fedlora.exporting.gguf_layout import ARCHITECTURES
from fedlora.exporting.gguf_model import to_gguf_model
from fedlora.exporting.write import merge
from fedlora.linalg.lowrank import LowRank
from fedlora.models.adapted import AdaptedModel, Scaling
from fedlora.parts.dense import Dense
from fedlora.parts.three_factor import ThreeFactor
from tiers import fast
from tiny_gguf import model_of, tokenizer_of

from architectures import model_of as classifier_of

gguf = pytest.importorskip("gguf")


def adapter_of(adapted: AdaptedModel) -> Adapter:
    """Random parts of unequal ranks, some of three factors."""
    random, found = torch.Generator().manual_seed(0), {}
    for i, (name, (out, in_)) in enumerate(adapted.spec.modules.items()):
        rank = 1 + i % 4
        b, a, c = (torch.randn(*shape, generator=random) for shape in ((out, rank), (rank, in_), (rank, rank)))
        found[name] = ThreeFactor(b=b, c=c, a=a) if i % 3 else LowRank(b=b, a=a)
    return found


def tensors(file: Path) -> dict[str, Tensor]:
    """The tensors as llama.cpp sees them."""
    found = {}
    for one in gguf.GGUFReader(file).tensors:
        assert one.data.shape == tuple(reversed(one.shape.tolist()))
        found[one.name] = torch.from_numpy(one.data.copy())
    return found


def metadata(file: Path) -> dict[str, Any]:
    return {key: entry.contents() for key, entry in gguf.GGUFReader(file).fields.items() if not key.startswith("GGUF.")}


@pytest.mark.parametrize("kind", fast(ARCHITECTURES, "gemma2", "gpt2", "llama", "qwen2"))
def test_the_base_and_the_scaled_product_of_the_adapters_factors_are_the_merged_model(kind, tmp_path):
    tokenizer = tokenizer_of(kind)
    model = model_of(kind, tokenizer)
    merged = copy.deepcopy(model)
    to_gguf_model(model, tmp_path / "base.gguf", tokenizer, torch.float32, "x")
    adapted = AdaptedModel(model, Scaling(6.0, rslora=True), "all-linear")
    adapter = adapter_of(adapted)
    assert unfit_for_gguf_adapter(adapter, adapted) is None
    to_gguf_adapter(adapter, tmp_path / "adapter.gguf", adapted)
    merge(adapter, merged, torch.float32)
    to_gguf_model(merged, tmp_path / "merged.gguf", tokenizer, torch.float32, "x")
    base, lora, whole = (tensors(tmp_path / f"{name}.gguf") for name in ("base", "adapter", "merged"))
    alpha = metadata(tmp_path / "adapter.gguf")["adapter.lora.alpha"]
    for name, expected in whole.items():
        found = base[name]
        if f"{name}.lora_a" in lora:
            a, b = lora.pop(f"{name}.lora_a"), lora.pop(f"{name}.lora_b")
            found = found + b @ a * (alpha / len(a))  # as llama.cpp adds it
        assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not lora and len(adapter) >= 8
    assert any(out != in_ for out, in_ in adapted.spec.modules.values())


def test_rows_of_query_and_key_are_reordered_as_pairs_of_one_rotation(tmp_path):
    """In a head of transformers, row i turns with row i + half; in llama.cpp, row 2 i with row 2 i + 1."""
    adapted = AdaptedModel(model_of("llama", tokenizer_of("llama")), Scaling(8.0), ["q_proj", "k_proj", "v_proj"])
    adapter = adapter_of(adapted)
    to_gguf_adapter(adapter, tmp_path / "x.gguf", adapted)
    found = tensors(tmp_path / "x.gguf")
    for i in range(2):
        for module, name, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)):
            product = adapter[f"model.layers.{i}.self_attn.{module}"].as_two_factors().product()
            half = len(product) // heads // 2
            rows = [product[h * 2 * half + j + k * half] for h in range(heads) for j in range(half) for k in range(2)]
            key = f"blk.{i}.{name}.weight"
            assert_close(found[f"{key}.lora_b"] @ found[f"{key}.lora_a"], torch.stack(rows), rtol=1e-5, atol=1e-5)
        product = adapter[f"model.layers.{i}.self_attn.v_proj"].as_two_factors().product()
        key = f"blk.{i}.attn_v.weight"
        assert_close(found[f"{key}.lora_b"] @ found[f"{key}.lora_a"], product, rtol=1e-5, atol=1e-5)


def test_the_file_says_what_it_is(tmp_path):
    adapted = AdaptedModel(model_of("mistral", tokenizer_of("mistral")), Scaling(8.0), ["q_proj", "v_proj"])
    to_gguf_adapter(adapter_of(adapted), tmp_path / "x.gguf", adapted)
    assert metadata(tmp_path / "x.gguf") == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 4.0,
    }


def test_a_trained_head_or_norm_is_rejected():
    adapted = AdaptedModel(model_of("llama", tokenizer_of("llama")), Scaling(8.0), ["q_proj"], head=["model.norm"])
    adapter = adapter_of(adapted) | {"model.norm.weight": Dense(torch.ones(32))}
    assert "model.norm.weight are not LoRA factors" in str(unfit_for_gguf_adapter(adapter, adapted))


def test_an_architecture_without_a_form_is_rejected_with_the_list_of_those_that_have_one():
    adapted = AdaptedModel(classifier_of("gpt_neox"), Scaling(8.0), ["query_key_value"])
    reason = str(unfit_for_gguf_adapter(adapter_of(adapted), adapted))
    assert "'gpt_neox'" in reason and reason.endswith(", ".join(ARCHITECTURES))
