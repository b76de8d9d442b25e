"""Schedules against those of transformers."""

from typing import Any

import pytest
import torch
import transformers

from fedlora.config.sections import Train
from fedlora.train.schedule import round_rate, schedule_notes, step_rate


def rates(make: Any, steps: int, **settings: Any) -> list[float]:
    """The factors of the learning rate that a schedule of transformers gives."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, found = make(optimizer, **settings), []
    for _ in range(steps):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
@pytest.mark.parametrize("warmup", [0, 1, 3, 30, 0.06, 0.5])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_a_schedule_is_that_of_transformers(name, warmup, steps):
    arguments = transformers.TrainingArguments("unused", warmup_steps=warmup, report_to="none")
    make = transformers.get_scheduler
    kind = "constant_with_warmup" if name == "constant" else name
    expected = rates(
        lambda optimizer: make(kind, optimizer, arguments.get_warmup_steps(steps), steps),
        steps,
    )
    settings = Train(schedule=name, warmup=warmup)
    assert [step_rate(settings, i, steps) for i in range(steps)] == pytest.approx(expected, abs=1e-12)


def test_a_cosine_over_rounds_with_a_floor_is_that_of_transformers():
    expected = rates(
        transformers.get_cosine_with_min_lr_schedule_with_warmup,
        10,
        num_warmup_steps=0,
        num_training_steps=10,
        min_lr_rate=0.02,
    )
    settings = Train(round_schedule="cosine", min_lr_rate=0.02)
    assert [round_rate(settings, i, 10) for i in range(10)] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_a_schedule_over_rounds_begins_at_one_and_never_reaches_its_floor(name):
    settings = Train(round_schedule=name, min_lr_rate=0.0 if name == "constant" else 0.1)
    found = [round_rate(settings, i, 5) for i in range(5)]
    assert found[0] == 1 and found == sorted(found, reverse=True) and found[-1] > settings.min_lr_rate


def test_the_user_is_told_which_clients_do_not_train_and_which_settings_have_no_effect():
    rows = {"x": range(8), "y": range(9), "z": range(3)}
    assert schedule_notes(Train(), rows) == schedule_notes(Train(warmup=1, epochs=2), rows) == []
    (note,) = schedule_notes(Train(warmup=0.1), rows)
    assert "2 of 3 clients" in note
    assert "3 of 3 clients" in schedule_notes(Train(warmup=2, max_steps=1), rows)[0]
    assert schedule_notes(Train(max_steps=4, epochs=2), rows) == ["train.max_steps = 4: train.epochs = 2 has no effect"]
