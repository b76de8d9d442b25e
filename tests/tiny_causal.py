"""Tiny causal language models with random weights. Need no network."""

from pathlib import Path

import torch
import transformers

from tiny import tiny_tokenizer

SHAPES = {
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "llama": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
    },
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}


def language_model(folder: Path, kind: str) -> Path:
    """Writes a language model with random weights, and a tokenizer of words; the folder."""
    tokenizer = tiny_tokenizer("[UNK]", "</s>", "[PAD]", eos_token="</s>", pad_token="[PAD]")
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": 2, "eos_token_id": 1, "bos_token_id": 1}
    config = transformers.AutoConfig.for_model(kind, **sizes, **SHAPES[kind])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
