"""Code that loads a merged model of a task with texts."""

_LOAD = """\
from pathlib import Path

from transformers import {model_class}, AutoTokenizer

folder = Path()  # where this file is
model = {model_class}.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
"""


def code_for_merged(model_class: str) -> str:
    """A Python program that loads a merged model by this class of transformers, and its tokenizer."""
    return _LOAD.format(model_class=model_class)
