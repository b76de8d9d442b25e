"""The table of tasks."""

from typing import get_args

import pytest

from fedlora.config.experiment import Experiment, build
from fedlora.config.sections import Task as TaskSection
from fedlora.errors import UserError
from fedlora.tasks.table import task_of, tasks
from fedlora.tasks.task import Task


def test_the_table_has_a_task_for_each_kind_that_can_be_set():
    assert set(tasks()) == set(get_args(TaskSection.model_fields["kind"].annotation))
    assert all(isinstance(task, Task) for task in tasks().values())


def test_an_experiment_names_its_task():
    assert task_of(Experiment().task.kind) is tasks()["classification"]
    assert build({"task": {"kind": "classification"}}) == Experiment()
    with pytest.raises(UserError, match=r"task\.kind"):
        build({"task": {"kind": "juggling"}})
