"""Suggestions for unknown keys and values."""

import difflib
from collections.abc import Iterable

_ALIKE = 0.7
"""Minimum similarity of a suggestion: 0.7 allows for a missing, additional or transposed letter."""


def closest(word: str, allowed: Iterable[str]) -> str | None:
    """Most similar allowed word, None if none is similar."""
    return next(iter(difflib.get_close_matches(word, list(allowed), n=1, cutoff=_ALIKE)), None)


def same_word(word: str, keys: Iterable[str]) -> list[str]:
    """Keys of this package for another project's term, else the keys of that name in any section."""
    return [ALIASES[word]] if word in ALIASES else [key for key in keys if key.rpartition(".")[2] == word]


def nearest(word: str, allowed: Iterable[str]) -> str:
    """The end of a message about an invalid word: the closest allowed word, or, if none is similar, all of them."""
    allowed = list(allowed)
    if near := closest(word, allowed):
        return f"; did you mean {near!r}?"
    return f"; allowed: {', '.join(allowed)}" if allowed else ""


def other_key(key: str, allowed: Iterable[str], everywhere: Iterable[str]) -> str:
    """The end of a message about a key that its section does not have.

    Suggests the key of this package for another project's term, else the keys of that name in all sections
    (`everywhere`), else the closest allowed key.
    """
    keys = same_word(key, everywhere)
    return f"; did you mean {' or '.join(map(repr, keys))}?" if keys else nearest(key, allowed)


class UnknownKey(ValueError):
    """A key that its section does not have; raised by code that does not have the keys of the other sections."""

    def __init__(self, message: str, key: str, allowed: Iterable[str]) -> None:
        super().__init__(message)
        self.key, self.allowed = key, allowed


ALIASES = {
    # earlier releases
    "together": "train.clients_per_step",
    "memory_mb": "train.activation_memory_mb",
    # PEFT
    "r": "method.rank",
    "lora_r": "method.rank",
    "alpha": "lora.alpha",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "use_rslora": "lora.rslora",
    "target_modules": "lora.targets",
    "init_lora_weights": "lora.init",
    "layers_to_transform": "lora.layers",
    # transformers
    "load_in_4bit": "quantize",
    "load_in_8bit": "quantize",
    "model_name": "model",
    "model_name_or_path": "model",
    "base_model": "model",
    "dataset": "data",
    "dataset_name": "data",
    "train_file": "data.source",
    "validation_file": "data.test",
    "learning_rate": "train.lr",
    "optim": "train.optimizer",
    "adam_beta1": "train.beta1",
    "adam_beta2": "train.beta2",
    "adam_epsilon": "train.eps",
    "lr_scheduler_type": "train.schedule",
    "warmup_steps": "train.warmup",
    "warmup_ratio": "train.warmup",
    "num_train_epochs": "train.epochs",
    "per_device_train_batch_size": "train.batch_size",
    "per_device_eval_batch_size": "evaluate.batch_size",
    "gradient_accumulation_steps": "train.accumulate",
    "label_smoothing_factor": "task.label_smoothing",
    "max_grad_norm": "train.clip_norm",
    "metric_for_best_model": "evaluate.metric",
    "early_stopping_patience": "evaluate.stop_after",
    "max_seq_length": "train.max_length",
    "bf16": "train.precision",
    # Flower
    "num_rounds": "rounds",
    "num_server_rounds": "rounds",
    "num_clients": "clients.count",
    "num_supernodes": "clients.count",
    "num_partitions": "clients.count",
    "local_epochs": "train.epochs",
    "strategy": "method.name",
    "fraction_fit": "sampling.fraction",
    "fraction_train": "sampling.fraction",
    "min_fit_clients": "sampling.min_replies",
    "min_train_nodes": "sampling.min_replies",
}
"""Keys of this package for terms of other projects and of earlier releases."""
