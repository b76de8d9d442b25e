"""Names of a task's metrics."""

from collections.abc import Sequence

from fedlora.messages import Statistics
from fedlora.tasks.task import Task


def metric_names(task: Task, labels: Sequence[str]) -> list[str]:
    """The names of the metrics of each client, of a task with these labels."""
    return list(task.metrics(Statistics(1, task.no_statistics(labels))))
