"""A model that a Python program passes: saved with the run, so that the run is resumed and exported without the program."""

from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError

from fedlora.errors import UserError
from fedlora.models.loading import quiet


def save(model: Any, tokenizer: Any, folder: Path) -> str:
    """The folder, with the model and its tokenizer in it; neither is changed.

    Raises:
        UserError: one of them is of another type, or the folder cannot be written.
    """
    for name, given, kind in (
        ("model", model, transformers.PreTrainedModel),
        ("tokenizer", tokenizer, transformers.PreTrainedTokenizerBase),
    ):
        if not isinstance(given, kind):
            raise UserError(
                f"{name} is of type {type(given).__name__}; expected a transformers.{kind.__name__}: a model is passed "
                "with its tokenizer, the name or folder of a model as Experiment(model=...)"
            )
    quiet()
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
    return str(folder.absolute())
