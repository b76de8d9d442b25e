"""Comparison of a model in a GGUF file, as transformers reads it, with the model that was written."""

from pathlib import Path
from typing import Any

import numpy as np
import transformers

from fedlora.errors import UserError

_TEXTS = (
    "The quick brown fox, 12345 times: it's 67.8% of what we'll do!\n\nif x == [1, 2]:\n    return None\t# done",
    "D\u00e9j\u00e0 vu na\u00efve \u00fcber stra\u00dfe \u041f\u0440\u0438\u0432\u0435\u0442 \u4f60\u597d",
)
_NO_EFFECT = (
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "label2id",
    "max_window_layers",  # of a sliding window that is not used
    "model_type",  # Mistral is written as Llama
    "name_or_path",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "sep_token_id",
    "task_specific_params",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
"""Ends of settings that do not change the logits of a language model."""


def check_read_back(file: Path, config: Any, tokenizer: Any) -> None:
    """Rejects a file from which transformers would not get this configuration and this tokenizer.

    Raises:
        UserError: it cannot be read, a setting that changes the logits is lost, or texts get other tokens.
    """
    where = {"gguf_file": file.name}
    try:
        found = _in_fp32(transformers.AutoConfig.from_pretrained(str(file.parent), **where).to_dict())
        again = transformers.AutoTokenizer.from_pretrained(str(file.parent), **where)
    except Exception as error:  # a setting or a tokenizer that transformers does not know
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"transformers cannot read a GGUF file of this model: {reason}; export a merged model") from error
    for key, value in _in_fp32(config.to_dict()).items():
        if not key.endswith(_NO_EFFECT) and "drop" not in key and not key.startswith("summary") and found.get(key) != value:
            raise UserError(
                f"a GGUF file cannot be read back by transformers with {key} = {value!r} in the model's config.json, "
                f"but with {found.get(key)!r}; export a merged model"
            )
    for text in _TEXTS:
        if tokenizer(text).input_ids != again(text).input_ids:
            raise UserError(
                "the tokenizer in a GGUF file would tokenize texts differently; export a merged model, and convert it with "
                "llama.cpp's convert_hf_to_gguf.py"
            )


def _in_fp32(value: Any) -> Any:
    """The settings with their numbers as precise as GGUF has them."""
    if isinstance(value, dict):
        return {key: _in_fp32(one) for key, one in value.items()}
    return float(np.float32(value)) if isinstance(value, float) else value
