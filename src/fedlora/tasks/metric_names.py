"""Names of a task's metrics."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.errors import UserError
from fedlora.messages import Statistics
from fedlora.tasks.table import task_of
from fedlora.tasks.task import Task


def metric_names(task: Task, labels: Sequence[str]) -> list[str]:
    """The names of the metrics of each client, of a task with these labels."""
    return list(task.metrics(Statistics(1, task.no_statistics(labels))))


def check_metric(key: str, metric: str, task: Mapping[str, Any], labels: Sequence[str]) -> None:
    """Checks that the task of these settings has the metric `clients.NAME.STATISTIC`, the value of the setting `key`.

    Raises:
        UserError: it has not; names the setting and the available metrics.
    """
    _, name, statistic = metric.split(".")
    names = metric_names(task_of(task), labels)
    if name not in names:
        known = ", ".join(f"clients.{one}.{statistic}" for one in names)
        raise UserError(f"{key} = {metric!r}: task.kind = {task['kind']!r} has no such metric; available: {known}")
