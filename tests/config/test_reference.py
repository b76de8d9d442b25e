"""The settings reference: complete, current, and right about what an experiment accepts."""

import tomllib
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel

from fedlora.config import reference
from fedlora.config.experiment import Experiment, build
from fedlora.errors import UserError
from fedlora.methods.fedloru import FedLoRU, PFedLoRU
from fedlora.methods.table import TABLE
from fedlora.ranges import AtMost, PositiveFloat, PositiveInt

COMMITTED = Path(__file__).parents[2] / "docs" / "settings.md"
ENTRIES = reference.settings()


def value_at(table: BaseModel, dotted: str) -> object:
    for key in dotted.split("."):
        table = getattr(table, key)
    return table


def test_the_committed_reference_is_what_the_code_gives():
    assert COMMITTED.read_text(encoding="utf-8") == reference.page(), "run scripts/pages"


def test_every_field_of_an_experiment_has_an_entry():
    fields = Experiment().model_dump(exclude={"method"})
    expected = {
        f"{name}.{key}" if isinstance(value, dict) else name
        for name, value in fields.items()
        for key in (value if isinstance(value, dict) else [""])
    }
    assert {entry.key for entry in ENTRIES if entry.section.split(".")[0] not in ("method", "wrap")} == expected
    assert {entry.key for entry in ENTRIES if entry.section == "method" and not entry.methods} == {
        "method.name",
        "method.head",
        "method.norms",
        "method.weights",
    }


@pytest.mark.parametrize("name", TABLE)
def test_every_setting_of_a_method_has_one_entry_with_its_default(name):
    own = {entry.key.removeprefix("method."): entry.default for entry in ENTRIES if name in entry.methods}
    written = {key: tomllib.loads(f"x = {default}")["x"] if default else None for key, default in own.items()}
    assert written == TABLE[name].settings()
    assert sum(name in entry.methods for entry in ENTRIES) == len(own)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry.key}-{'-'.join(entry.methods[:1])}")
def test_every_setting_has_a_description_a_default_or_an_example_and_both_are_accepted(entry):
    assert entry.text.endswith(".")
    name = next(iter(entry.methods), "fl-tac" if entry.key == "method.head" else "flexlora")
    changes = [] if entry.key == "method.name" else [f"method.name={name}"]
    if entry.key.startswith("privacy.") and entry.key != "privacy.unit":
        noise = [] if entry.key in ("privacy.epsilon", "privacy.noise_multiplier") else ["privacy.epsilon=1.0"]
        quantile = ["privacy.clip_quantile=0.5"] if entry.key == "privacy.clip_rate" else []
        unit = "client" if entry.key.startswith(("privacy.clip_", "privacy.largest_")) else "record"
        changes += [f"privacy.unit={unit}", "privacy.delta=1e-5", "evaluate.clients=none", *noise, *quantile]
    experiment = build({}, [*changes, f"{entry.key}={entry.example}"])
    if entry.key.startswith("wrap"):
        return  # see test_wrappers.py
    assert value_at(experiment, entry.key) == tomllib.loads(f"x = {entry.example}")["x"]
    if entry.default:
        assert value_at(build({}, changes), entry.key) == tomllib.loads(f"x = {entry.default}")["x"]


def test_a_subclass_has_the_docstrings_of_inherited_fields_and_its_own():
    inherited, own = reference.docstrings(FedLoRU), reference.docstrings(PFedLoRU)
    assert own["every"] == inherited["every"] and own.keys() - inherited.keys() == {"personal_rank"}


def test_values_are_described_in_words():
    assert reference.values(Literal["a", "b"] | None) == '"a", "b"'
    assert reference.values(list[PositiveInt] | str) == "a list, each entry a whole number of at least 1, or text"
    assert reference.values(dict[str, bool]) == "a table, each value true or false"
    bounded = Annotated[PositiveFloat, AtMost("rounds", less=1)] | None
    assert reference.values(bounded) == "a finite number above 0 and at most `rounds` - 1"


def test_a_key_gives_all_its_entries_and_a_section_all_its_keys():
    assert [entry.key for entry in reference.find("train.lr")] == ["train.lr"]
    assert {entry.default for entry in reference.find("method.rank")} == {"8", "16"}
    assert {entry.key for entry in reference.find("deploy")} == {"deploy.deadline", "deploy.wait", "deploy.poll"}


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("train.lrr", "'train.lr'"),
        ("lr", "'train.lr'"),
        ("batch_size", "'train.batch_size' or 'evaluate.batch_size'"),
        ("densty_up", "'method.density_up'"),
        ("learning_rate", "'train.lr'"),
        ("trainn.epochs", "'train.epochs'"),
    ],
)
def test_an_unknown_key_gets_the_nearest_ones(key, near):
    with pytest.raises(UserError, match=f"unknown setting '{key}'; did you mean {near}\\?"):
        reference.find(key)


def test_a_key_unlike_any_other_is_pointed_to_the_list():
    with pytest.raises(UserError, match="`fedlora settings` lists all"):
        reference.find("qqqq")
