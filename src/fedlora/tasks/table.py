"""The table of tasks."""

from collections.abc import Mapping
from functools import cache

from fedlora.tasks.task import Task


@cache
def tasks() -> Mapping[str, Task]:
    """Each value of the setting `task.kind`, and its task."""
    from fedlora.tasks.classification import Classification  # imports transformers, which takes seconds

    return {"classification": Classification()}


def task_of(kind: str) -> Task:
    """The task of this kind."""
    return tasks()[kind]
