"""llama.cpp computes what the model computes, from the merged file, and from the base's file with the adapter's."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gguf_adapter import adapter_of
from torch import Tensor
from torch.testing import assert_close

from fedlora.exporting.gguf_adapter import to_gguf_adapter
from fedlora.exporting.gguf_layout import ARCHITECTURES
from fedlora.exporting.gguf_model import to_gguf_model
from fedlora.exporting.write import merge
from fedlora.models.adapted import AdaptedModel, Scaling
from fedlora.parts.table import mapped
from tiny_gguf import model_of, tokenizer_of

pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")

pytestmark = pytest.mark.slow
TEXT = "dimdil 3 gup babbad!"


def expected(model: Any, tokenizer: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([tokenizer(TEXT).input_ids])).logits
    return logits[0, -1].log_softmax(-1)


def found(tokenizer: Any, size: int, prompt: list[int] | str, file: Path, adapter: Path | None = None) -> Tensor:
    """llama.cpp's log-probabilities of the token after the prompt."""
    settings = llama_cpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_gpu_layers, settings.warmup = str(file), 64, 0, False
    settings.cpuparams.n_threads = 1
    if adapter is not None:
        settings.lora_adapters = [llama_cpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    letter = tokenizer.convert_tokens_to_ids("b")  # there is no answer for a token that is a part of a character
    asked = {"prompt": prompt, "n_predict": 1, "logprobs": size, "temperature": 0.0, "logit_bias": [[letter, 1000.0]]}
    answer = llama_cpp.Server(settings).handle_completions(asked)
    tokens = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return torch.tensor([one["logprob"] for one in sorted(tokens, key=lambda one: one["id"])])


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_llama_cpp_predicts_the_same_from_the_merged_file_and_from_the_base_with_the_adapter(kind, tmp_path):
    tokenizer = tokenizer_of(kind)
    model = model_of(kind, tokenizer)
    merged, size = copy.deepcopy(model), model.get_input_embeddings().num_embeddings
    to_gguf_model(model, tmp_path / "base.gguf", tokenizer, torch.float32, "x")
    before, adapted = expected(model, tokenizer), AdaptedModel(model, Scaling(8.0), "all-linear")
    adapter = {name: mapped(part, lambda x: 0.3 * x) for name, part in adapter_of(adapted).items()}
    to_gguf_adapter(adapter, tmp_path / "adapter.gguf", adapted)
    merge(adapter, merged, torch.float32)
    to_gguf_model(merged, tmp_path / "merged.gguf", tokenizer, torch.float32, "x")
    after = expected(merged, tokenizer)
    assert (after - before).abs().max() > 0.5
    close = {"rtol": 0.0, "atol": 0.02}  # llama.cpp keeps keys and values in fp16
    assert_close(found(tokenizer, size, TEXT, tmp_path / "base.gguf"), before, **close)
    ids = tokenizer(TEXT).input_ids
    assert_close(found(tokenizer, size, ids, tmp_path / "merged.gguf"), after, **close)
    assert_close(found(tokenizer, size, ids, tmp_path / "base.gguf", tmp_path / "adapter.gguf"), after, **close)
