"""Tiny language models of the architectures that are exported to GGUF, with trained tokenizers. Need no network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers.tokenization_utils_base import generate_merges

from tiny import WORDS

SPLIT = (  # as Qwen2 splits texts
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DECODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "gemma2": {**_DECODER, "head_dim": 256, "query_pre_attn_scalar": 256},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024},
    "llama": {**_DECODER, "head_dim": 12},
    "mistral": {**_DECODER, "head_dim": 12, "sliding_window": None},
    "phi3": _DECODER,
    "qwen2": _DECODER,
    "qwen3": {**_DECODER, "head_dim": 128},
    "stablelm": {**_DECODER, "use_qkv_bias": True},
}
_PREFIXES = {"gemma2": "never", "mistral": "first", "phi3": "always"}
"""Models with a tokenizer of SentencePiece's kind."""


def byte_level_tokenizer(split: Any = None, regex: bool = True) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of bytes that splits texts in this way first, and then as GPT-2 does if `regex`."""
    tokenizer = Tokenizer(models.BPE())
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, *steps]) if split is not None else steps[0]
    special = ["<|endoftext|>", "<|im_start|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    ends = {"eos_token": special[0], "pad_token": special[0]}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=special[1:], **ends)


def pieces_tokenizer(bos: bool = True, prefix: str = "first") -> transformers.PreTrainedTokenizerFast:
    """A tokenizer like Llama's: merges are all pairs of tokens that make a token, and unknown characters are bytes.

    `prefix` says before which texts it puts a space: "never", "always", or "first", those without one.
    """
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    trained.train_from_iterator([" ".join(WORDS)], trainer)
    vocabulary = trained.get_vocab()
    merges = generate_merges(vocabulary, {token: -i for token, i in vocabulary.items()})
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if prefix == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        first = [normalizers.Prepend("\u2581")] if prefix == "always" else []
        tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "\u2581")])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def tokenizer_of(kind: str) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of the kind that published models of this type have."""
    if kind in _PREFIXES:
        return pieces_tokenizer(prefix=_PREFIXES[kind])
    if kind.startswith("qwen"):
        return byte_level_tokenizer(pre_tokenizers.Split(Regex(SPLIT), "isolated"), regex=False)
    return byte_level_tokenizer(pre_tokenizers.Digits(individual_digits=True) if kind == "llama" else None)


def model_of(kind: str, tokenizer: Any, **more: Any) -> nn.Module:
    """A language model in which no parameter is 0 or 1, the same whenever it is made; it has a few unused embeddings."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = transformers.AutoConfig.for_model(
        kind, **{**CONFIGS.get(kind, {}), "vocab_size": len(tokenizer) + 3, **ids, **more}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def tiny_gguf(folder: Path, kind: str, **more: Any) -> Path:
    """Writes such a model and its tokenizer as a folder of transformers, which can be exported to GGUF; the folder."""
    tokenizer = tokenizer_of(kind)
    model_of(kind, tokenizer, **more).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
