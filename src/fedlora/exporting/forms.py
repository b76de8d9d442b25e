"""The forms in which a run's model is exported."""

from typing import Literal

Form = Literal["adapter", "serving", "merged", "gguf-adapter", "gguf-merged"]
"""adapter: a PEFT folder. serving: a PEFT folder of one rank and scale, for vLLM and LoRAX. merged: the whole model as a
folder of transformers. gguf-adapter, gguf-merged: a file for llama.cpp, of the adapter or of the whole model."""

GGUF_ADAPTER, GGUF_MODEL = "adapter.gguf", "model.gguf"
"""The names of the files for llama.cpp."""

Dtype = Literal["fp32", "bf16", "fp16"]
"""The data type of a whole model's weights."""


def is_whole_model(form: Form) -> bool:
    """Whether the form holds the base model, too."""
    return form in ("merged", "gguf-merged")


def is_gguf(form: Form) -> bool:
    """Whether the form is a GGUF file."""
    return form in ("gguf-adapter", "gguf-merged")
