"""The table of tasks."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from fedlora.tasks.task import Task


@cache
def tasks() -> Mapping[str, Callable[..., Task]]:
    """Each value of the setting `task.kind`, and its task: a dataclass, whose fields are settings of `[task]`."""
    from fedlora.tasks.causal_lm import CausalLM  # imports transformers, which takes seconds
    from fedlora.tasks.classification import Classification
    from fedlora.tasks.image_classification import ImageClassification
    from fedlora.tasks.multiple_choice import MultipleChoice
    from fedlora.tasks.regression import Regression
    from fedlora.tasks.seq2seq import Seq2Seq
    from fedlora.tasks.tagging import Tagging

    return {
        "classification": Classification,
        "regression": Regression,
        "image-classification": ImageClassification,
        "tagging": Tagging,
        "multiple-choice": MultipleChoice,
        "causal-lm": CausalLM,
        "seq2seq": Seq2Seq,
    }


def task_of(settings: Mapping[str, Any]) -> Task:
    """The task of the settings in `[task]`."""
    make: Any = tasks()[settings["kind"]]
    found: Task = make(**{one.name: settings[one.name] for one in fields(make)})
    return found
