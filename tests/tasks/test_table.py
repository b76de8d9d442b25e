"""The table of tasks."""

from dataclasses import fields
from typing import get_args

import pytest

from fedlora.config.experiment import Experiment, build
from fedlora.config.sections import Task as TaskSection
from fedlora.errors import UserError
from fedlora.tasks.table import task_of, tasks
from fedlora.tasks.task import Task


def test_the_table_has_a_task_for_each_kind_that_can_be_set():
    assert set(tasks()) == set(get_args(TaskSection.model_fields["kind"].annotation))
    assert all(isinstance(task_of(dict(TaskSection(kind=kind))), Task) for kind in tasks())


def test_every_field_of_a_task_is_a_setting_with_the_same_default():
    settings = dict(TaskSection())
    for make in tasks().values():
        assert {one.name: one.default for one in fields(make)}.items() <= settings.items()


def test_an_experiment_names_its_task_in_full_or_in_short():
    assert type(task_of(dict(Experiment().task))) is tasks()["classification"]
    assert build({"task": {"kind": "classification"}}) == Experiment() == build({"task": "classification"})
    assert build({"task": "regression"}).task.kind == "regression" == build({}, ["task=regression"]).task.kind
    assert build({"task": "regression"}, ["task.center=2.5"]).task == TaskSection(kind="regression", center=2.5)
    with pytest.raises(UserError, match=r"task\.kind"):
        build({"task": "juggling"})
