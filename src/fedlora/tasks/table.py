"""The kinds of tasks."""

from collections.abc import Mapping

from fedlora.tasks.classification import Classification
from fedlora.tasks.task import Task

TASKS: Mapping[str, Task] = {"classification": Classification()}
"""Each value of the setting `task.kind`, and its task."""


def task_of(kind: str) -> Task:
    """The task of this kind."""
    return TASKS[kind]
