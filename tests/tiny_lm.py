"""Tiny language models with random weights, a tokenizer with a chat template, and examples for them. Need no network."""

import json
from pathlib import Path
from typing import Any

import transformers

from tiny import WORDS, tiny_model, tiny_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|> ' + m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|> ' + m['role'] + ' ' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + ' </s>' }}{% endgeneration %}{% else %}{{ m['content'] + ' </s>' }}{% endif %}"
    "{{ ' ' }}{% endfor %}"
)
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
    },
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
}


def lm_tokenizer(template: str | None = None, **names: str) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of words, whose pad token is its eos token."""
    special = {"eos_token": "</s>", "pad_token": "</s>", "additional_special_tokens": ["<|im_start|>"], **names}
    tokenizer = tiny_tokenizer("[UNK]", "</s>", "<|im_start|>", "<s>", "user", "assistant", "system", **special)
    tokenizer.chat_template = template
    return tokenizer


def tiny_lm(folder: Path, kind: str = "llama", template: str | None = None, **more: Any) -> Path:
    """Writes a language model of this architecture and its tokenizer; the folder."""
    tokenizer = lm_tokenizer(template)
    settings = {
        "vocab_size": len(tokenizer),
        "pad_token_id": 1,
        "eos_token_id": 1,
        "bos_token_id": 3,
        **CONFIGS.get(kind, {}),
        **more,
    }
    config = transformers.AutoConfig.for_model(kind, **settings)
    return tiny_model(folder, config, tokenizer, auto=transformers.AutoModelForCausalLM)


def pair(i: int) -> tuple[str, str]:
    """A prompt of 2 to 7 words, and an answer of 1 to 4."""
    prompt = [WORDS[(7 * i + j) % len(WORDS)] for j in range(2 + i % 6)]
    return " ".join(prompt), " ".join(WORDS[(3 * i + 5 * j) % len(WORDS)] for j in range(1 + i % 4))


def pair_rows(path: Path, n: int) -> Path:
    """Writes prompts with answers, also as conversations and texts, as JSON Lines; the file."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(n):
            prompt, response = pair(i)
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            row = {"prompt": prompt, "response": response, "messages": messages, "text": f"{prompt} {response}"}
            file.write(json.dumps({**row, "user": f"u{i % 4}"}) + "\n")
    return path
