"""Tiny encoder-decoders with random weights, and their tokenizers. Need no network."""

from pathlib import Path
from typing import Any

import transformers
from tokenizers import decoders, processors

from architectures import CONFIGS
from tiny import tiny_model, tiny_tokenizer

KINDS = ("t5", "bart")


def seq2seq_tokenizer(kind: str) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of words that puts eos after each text, as T5 does, and bos before it for BART."""
    special = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"}
    tokenizer = tiny_tokenizer("<unk>", "<pad>", "</s>", "<s>", append="</s>", pieces=kind == "t5", **special)
    if kind == "t5":
        tokenizer.backend_tokenizer.decoder = decoders.Metaspace()
    else:
        ends = [("<s>", 3), ("</s>", 2)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ends)
    return tokenizer


def tiny_seq2seq(folder: Path, kind: str, **more: Any) -> Path:
    """Writes an encoder-decoder of this architecture, by default without dropout, and its tokenizer; the folder."""
    tokenizer = seq2seq_tokenizer(kind)
    still = {"init_std": 0.2, "dropout_rate": 0.0, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 3}
    start = {"decoder_start_token_id": 1 if kind == "t5" else 2}
    config = transformers.AutoConfig.for_model(kind, **{**CONFIGS[kind], **still, **ids, **start, **more})
    return tiny_model(folder, config, tokenizer, auto=transformers.AutoModelForSeq2SeqLM)
