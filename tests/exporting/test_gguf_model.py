"""Whole models in GGUF files are read back by transformers as they were."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers.pre_tokenizers import Punctuation
from torch import Tensor, nn
from torch.testing import assert_close

from fedlora.errors import UserError
from fedlora.exporting.gguf_layout import ARCHITECTURES
from fedlora.exporting.gguf_model import to_gguf_model
from fedlora.tasks.causal_lm import CausalLM
from tiers import fast
from tiny_gguf import byte_level_tokenizer, model_of, pieces_tokenizer, tokenizer_of

from tiny import tiny_tokenizer

gguf = pytest.importorskip("gguf")

TEXTS = ["babbad 12 cecd!", " dif  fol's\n\tx", "\u00e9t\u00e9 \u4f60\u597d"]
KINDS = fast(ARCHITECTURES, "gemma2", "gpt2", "llama", "mistral", "qwen2")


def logits(model: Any, size: int) -> Tensor:
    ids = torch.randint(size, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=ids).logits
    return found


def read(file: Path) -> tuple[nn.Module, Any]:
    where = {"gguf_file": file.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **where, dtype=torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(file.parent, **where)


def metadata(file: Path) -> dict[str, Any]:
    return {key: entry.contents() for key, entry in gguf.GGUFReader(file).fields.items() if not key.startswith("GGUF.")}


def write(file: Path, kind: str, tokenizer: Any = None, dtype: torch.dtype = torch.float32, **more: Any) -> nn.Module:
    tokenizer = tokenizer or tokenizer_of(kind)
    model = model_of(kind, tokenizer, **more)
    to_gguf_model(model, file, tokenizer, dtype, "some/model")
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_the_same_logits_and_tokens_from_the_file(kind, tied, tmp_path):
    tokenizer = tokenizer_of(kind)
    if kind == "gemma2" and not tied:
        pytest.skip("Gemma 2 has no output layer of its own in GGUF")
    model = write(tmp_path / "x.gguf", kind, tokenizer, tie_word_embeddings=tied)
    again, read_tokenizer = read(tmp_path / "x.gguf")
    assert_close(logits(again, len(tokenizer)), logits(model, len(tokenizer)), rtol=0, atol=0)
    assert [read_tokenizer(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]
    assert read_tokenizer.eos_token_id == tokenizer.eos_token_id
    assert read_tokenizer.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_matrices_are_rounded_to_the_data_type_and_vectors_are_not(kind, dtype, tmp_path):
    model = write(tmp_path / "x.gguf", kind, dtype=dtype)
    again, _ = read(tmp_path / "x.gguf")
    for name, parameter in again.named_parameters():
        own = model.get_parameter(name)
        exact = own.ndim == 1 or name == "transformer.wpe.weight"
        assert_close(parameter, own if exact else own.to(dtype).float(), rtol=0, atol=0)


def test_a_chat_template_is_kept(tmp_path):
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    write(tmp_path / "x.gguf", "llama", tokenizer)
    assert read(tmp_path / "x.gguf")[1].chat_template == tokenizer.chat_template


@pytest.mark.parametrize("bos", [False, True])
def test_whether_a_text_begins_with_bos_is_kept(bos, tmp_path):
    tokenizer = pieces_tokenizer(bos=bos)
    write(tmp_path / "x.gguf", "mistral", tokenizer)
    assert read(tmp_path / "x.gguf")[1](TEXTS[0]).input_ids == tokenizer(TEXTS[0]).input_ids
    assert metadata(tmp_path / "x.gguf")["tokenizer.ggml.add_bos_token"] == bos


def test_a_model_from_a_gguf_file_keeps_its_metadata(tmp_path):
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    model = write(first, "llama")
    found, tokenizer, _ = CausalLM().load(str(first), (), 0)
    to_gguf_model(found, second, tokenizer, torch.float16, str(first))
    changed = {"general.file_type": 1}
    assert metadata(second) == metadata(first) | changed and metadata(first)["general.file_type"] == 0
    assert_close(logits(read(second)[0], 300), logits(model, 300), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        (
            "gpt_neox",
            {"hidden_size": 32, "num_attention_heads": 4},
            r"models of type 'gpt_neox' are not exported to GGUF; supported: gemma2, gpt2, llama",
        ),
        ("mistral", {"sliding_window": 8}, "sliding_window = 8"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("llama", {"attention_bias": True}, "attention_bias = True"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
            "rope_parameters = .*linear",
        ),
        ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar = 64"),
        ("gemma2", {"head_dim": 128}, "head_dim = 128, and query_pre_attn_scalar = 256"),
        ("gpt2", {"n_positions": 64}, "n_positions = 64"),
    ],
)
def test_a_setting_that_the_format_loses_is_rejected_with_its_name(kind, more, message, tmp_path):
    with pytest.raises(UserError, match=message):
        write(tmp_path / "x.gguf", kind, **more)


def test_a_head_has_no_place_in_the_file(tmp_path):
    tokenizer = tokenizer_of("llama")
    model = transformers.AutoModelForSequenceClassification.from_config(model_of("llama", tokenizer).config)
    with pytest.raises(UserError, match=r"score\.weight has no place in a GGUF file; export a merged model"):
        to_gguf_model(model, tmp_path / "x.gguf", tokenizer, torch.float32, "x")


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (tiny_tokenizer("<unk>", "<s>", eos_token="<s>", pad_token="<s>"), "of type WordLevel, not BPE"),
        (byte_level_tokenizer(Punctuation()), "splits or normalizes texts"),
    ],
)
def test_a_tokenizer_without_a_form_in_gguf_is_rejected(tokenizer, message, tmp_path):
    with pytest.raises(UserError, match=f"cannot be written to GGUF: .*{message}.*; export a merged model"):
        write(tmp_path / "x.gguf", "llama", tokenizer)


def test_a_tokenizer_that_would_be_read_differently_is_rejected(tmp_path):
    with pytest.raises(UserError, match="would tokenize texts differently; export a merged model"):
        write(tmp_path / "x.gguf", "mistral", pieces_tokenizer(prefix="never"))
