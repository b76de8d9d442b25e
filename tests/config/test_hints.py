"""What a message about an unknown key suggests."""

from typing import Any

import pytest

from fedlora.config.experiment import Experiment, build
from fedlora.config.hints import ALIASES
from fedlora.config.sections import all_keys
from fedlora.errors import UserError


def hint(table: dict[str, Any]) -> str:
    with pytest.raises(UserError) as rejected:
        build(table)
    return str(rejected.value).partition("; ")[2]


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"method": {"alpha": 1}}, "did you mean 'lora.alpha'?"),
        ({"train": {"alpha": 1}}, "did you mean 'lora.alpha'?"),
        ({"train": {"seed": 1}}, "did you mean 'seed'?"),
        ({"lora": {"r": 1}}, "did you mean 'method.rank'?"),
        ({"lora": {"rank": 1}}, "did you mean 'method.rank'?"),
        ({"rank": 1}, "did you mean 'method.rank'?"),
        ({"lr": 1}, "did you mean 'train.lr'?"),
        ({"clients": {"fraction": 1}}, "did you mean 'sampling.fraction'?"),
        ({"lora": {"batch_size": 1}}, "did you mean 'train.batch_size' or 'evaluate.batch_size'?"),
        ({"evaluate": {"rounds": 1}}, "did you mean 'rounds'?"),
        ({"train": {"epoch": 1}}, "did you mean 'epochs'?"),
        ({"num_rounds": 1}, "did you mean 'rounds'?"),
        ({"train": {"per_device_train_batch_size": 1}}, "did you mean 'train.batch_size'?"),
        ({"clients": {"fraction_fit": 1}}, "did you mean 'sampling.fraction'?"),
        ({"dataset": {"path": "x"}}, "did you mean 'data'?"),
    ],
)
def test_an_unknown_key_is_pointed_to_the_place_of_ours(table, expected):
    assert hint(table) == expected


@pytest.mark.parametrize("key", ["torch_compile", "qqqq"])
def test_a_key_far_from_all_allowed_ones_gets_their_list(key):
    assert hint({"train": {key: 1}}).startswith("allowed: optimizer, lr, schedule, ")


def test_every_word_of_another_project_leads_to_a_key_that_exists():
    assert set(ALIASES.values()) <= set(all_keys(Experiment))


def test_a_long_value_is_cut():
    with pytest.raises(UserError) as rejected:
        build({"data": ["private " * 1000]})
    assert len(str(rejected.value)) < 300
