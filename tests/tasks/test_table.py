"""The table of tasks."""

import ast
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


@pytest.mark.parametrize("kind", tasks())
def test_the_code_in_an_adapters_readme_passes_on_what_loading_the_base_needs(kind):
    code = task_of(dict(TaskSection(kind=kind))).loading_code(("a", "b"), 0, ", quantization_config={'load_in_4bit': True}")
    (call,) = (one for one in ast.walk(ast.parse(code)) if isinstance(one, ast.Call) and _keyword(one) is not None)
    assert ast.literal_eval(_keyword(call)) == {"load_in_4bit": True} and ast.unparse(call.func).endswith("from_pretrained")


def _keyword(call: ast.Call) -> ast.expr | None:
    return next((one.value for one in call.keywords if one.arg == "quantization_config"), None)


def test_an_experiment_names_its_task_in_full_or_in_short():
    assert type(task_of(dict(Experiment().task))) is tasks()["classification"]
    assert build({"task": {"kind": "classification"}}) == Experiment() == build({"task": "classification"})
    assert build({"task": "regression"}).task.kind == "regression" == build({}, ["task=regression"]).task.kind
    assert build({"task": "regression"}, ["task.center=2.5"]).task == TaskSection(kind="regression", center=2.5)
    with pytest.raises(UserError, match=r"task\.kind"):
        build({"task": "juggling"})
