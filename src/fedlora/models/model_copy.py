"""Saves a model passed from Python with the run, so that the run can be resumed and exported without the program."""

from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError

from fedlora.errors import UserError
from fedlora.models.loading import quiet


def save(model: Any, tokenizer: Any, folder: Path) -> str:
    """Saves the model and its tokenizer or image processor, unchanged, into the folder, and returns the folder.

    Raises:
        UserError: the model or the tokenizer has an unsupported type, or the folder cannot be written.
    """
    for name, given, kind in (
        ("model", model, (transformers.PreTrainedModel,)),
        ("tokenizer", tokenizer, (transformers.PreTrainedTokenizerBase, transformers.ImageProcessingMixin)),
    ):
        if not isinstance(given, kind):
            raise UserError(
                f"{name} is of type {type(given).__name__}; expected a transformers.{kind[0].__name__}: a model is passed "
                "with its tokenizer or image processor, the name or folder of a model as Experiment(model=...)"
            )
    quiet()
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
    return str(folder.absolute())
