"""Code that loads the adapter of a language model."""

_LOAD = """\
from pathlib import Path

from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

folder = Path()  # where this file is
model = AutoPeftModelForCausalLM.from_pretrained(folder{arguments})
tokenizer = AutoTokenizer.from_pretrained(folder)
"""


def language_model_code(arguments: str) -> str:
    """A Python program that loads the adapter on its language model, with these further arguments."""
    return _LOAD.format(arguments=arguments)
