"""Every setting has a range in its annotation, and refuses what is outside it: in the file and in Python."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest
from pydantic import BaseModel

from fedlora.config.experiment import Experiment, build
from fedlora.errors import UserError
from fedlora.methods.table import TABLE
from fedlora.ranges import AtMost, Fraction, NonNegativeInt, PositiveInt, Range, checked, validated

INF, NAN = math.inf, math.nan
SECTIONS = {
    name: hint
    for name, hint in get_type_hints(Experiment).items()
    if isinstance(hint, type) and issubclass(hint, BaseModel) and name != "method"
}


def settings() -> Iterator[tuple[str, str, Any]]:
    """Section or method, key, and annotation of every setting that a user has."""
    for row in TABLE.values():
        hints = get_type_hints(row.make, include_extras=True)
        yield from ((row.name, key, hints[key]) for key in row.settings())
    for section, model in SECTIONS.items():
        yield from (
            (section, key, hint)
            for key, hint in get_type_hints(model, include_extras=True).items()
            if key in model.model_fields
        )
    yield from (("", key, get_type_hints(Experiment, include_extras=True)[key]) for key in ("seed", "rounds"))


def numbers(hint: Any) -> Iterator[tuple[type, Range | None]]:
    """The kind and the range of each number in an annotation."""
    if get_origin(hint) is Annotated and hint.__origin__ in (int, float):
        yield hint.__origin__, next((item for item in hint.__metadata__ if isinstance(item, Range)), None)
    elif hint in (int, float):
        yield hint, None
    elif get_origin(hint) is not Literal:
        for part in get_args(hint):
            yield from numbers(part)


def outside(kind: type, bounds: Range) -> list[Any]:
    """What is no number of this kind, and the numbers just beyond each bound."""
    step = 1 if kind is int else 1e-9
    closed = [x for x in (bounds.gt, bounds.lt) if x is not None]
    beyond = [x - step for x in (bounds.ge,) if x is not None] + [x + step for x in (bounds.le,) if x is not None]
    return [kind(x) for x in closed + beyond] + [NAN, INF, -INF, True, "8", *([2.0] if kind is int else [])]


def placed(hint: Any, value: Any) -> Any:
    """The value where the annotation has its numbers: in a list, in a mapping, or by itself."""
    kinds = {get_origin(part) for part in (hint, *get_args(hint))}
    return [value] if list in kinds else {"x": value} if dict in kinds else value


def table(owner: str, key: str, value: Any) -> dict[str, Any]:
    """An experiment that has the setting."""
    if owner in TABLE:
        return {"method": {"name": owner, key: value}}
    return {owner: {key: value}} if owner else {key: value}


NUMBERS = [(owner, key, hint, kind, bounds) for owner, key, hint in settings() for kind, bounds in numbers(hint)]
every_number = pytest.mark.parametrize(
    ("owner", "key", "hint", "kind", "bounds"), NUMBERS, ids=[f"{owner}.{key}" for owner, key, *_ in NUMBERS]
)


@every_number
def test_every_number_among_the_settings_has_a_range(owner, key, hint, kind, bounds):
    assert isinstance(bounds, Range)


def test_the_default_of_every_setting_is_within_its_range():
    for row in TABLE.values():
        assert row.make(**row.fixed_settings) == row.make(**row.fixed_settings, **row.settings())
    assert build(Experiment().model_dump()) == Experiment()


@every_number
def test_a_setting_out_of_range_is_refused_in_the_file_with_key_value_and_range(owner, key, hint, kind, bounds):
    section = "method." if owner in TABLE else f"{owner}." if owner else ""
    for value in outside(kind, bounds):
        with pytest.raises(UserError) as rejected:
            build(table(owner, key, placed(hint, value)))
        message = str(rejected.value)
        assert f"{section}{key}" in message and f" = {value!r}: " in message and "\n" not in message
        allowed = "'auto'" if (key, value) == ("devices", "8") else bounds.text(kind)
        assert allowed in message


@every_number
def test_a_setting_out_of_range_is_refused_in_python_with_key_value_and_range(owner, key, hint, kind, bounds):
    for value in outside(kind, bounds):
        if owner in TABLE and type(value) is kind:  # other types are refused by the type checks under which tests run
            with pytest.raises(ValueError) as rejected:
                TABLE[owner].make(**TABLE[owner].fixed_settings, **{key: value})
            assert str(rejected.value) == f"{key} = {value!r}: expected {bounds.text(kind)}"
        elif owner:
            with pytest.raises(ValueError, match=f"expected {bounds.text(kind)}|Input should be"):
                SECTIONS[owner](**{key: placed(hint, value)}) if owner in SECTIONS else validated(
                    TABLE[owner].make, {key: value}
                )


FLAGS = [(owner, key) for owner, key, hint in settings() if hint is bool]
WORDS = [(owner, key) for owner, key, hint in settings() if get_origin(hint) is Literal]


@pytest.mark.parametrize(("owner", "key", "value"), [(*case, value) for case in FLAGS for value in (1, "yes", 0.0)])
def test_a_flag_is_true_or_false_and_nothing_else(owner, key, value):
    with pytest.raises(UserError, match=rf"{key} = {value!r}: .*boolean"):
        build(table(owner, key, value))


@pytest.mark.parametrize(("owner", "key", "value"), [(*case, value) for case in WORDS for value in ("nonsense", 1)])
def test_a_choice_is_one_of_its_words(owner, key, value):
    with pytest.raises(UserError, match=rf"{key} = {value!r}: "):
        build(table(owner, key, value))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.name=hetlora", "method.min_rank=9"], "method.min_rank = 9: expected at most 8, as rank = 8"),
        (["method.name=flasc", "method.static_from=5"], "method.static_from = 5: expected at most 4, as rounds = 5"),
        (["method.name=fedlease", "method.warmup_rounds=6"], "method.warmup_rounds = 6: expected at most 5, as rounds = 5"),
        (["method.name=fedlease", "method.experts=11"], "method.experts = 11: expected at most 10, as clients.count = 10"),
        (["method.name=fl-tac", "method.tasks=4", "clients.count=3"], "method.tasks = 4: expected at most 3, as"),
        (["sampling.min_replies=11"], "sampling.min_replies = 11: expected at most 10, as clients.count = 10"),
    ],
)
def test_a_setting_above_what_another_allows_is_refused_before_anything_loads(overrides, message):
    with pytest.raises(UserError) as rejected:
        build({}, overrides)
    assert message in str(rejected.value)


def test_a_bound_by_another_setting_includes_the_bound_itself():
    assert build({}, ["method.name=flasc", "method.static_from=4"]).rounds == 5
    lease = build({}, ["method.name=fedlease", "method.warmup_rounds=5", "method.experts=10"])
    assert (lease.rounds, lease.clients.size) == (5, 10)
    tasks = build({}, ["method.name=fl-tac", "method.tasks=40", "data.task=task"])  # each client has tasks of its own
    assert tasks.clients.size is None or tasks.clients.size < 40
    assert build({}, ["method.name=hetlora", "method.rank=9", "method.min_rank=9"]).method.rank == 9


@dataclass(frozen=True)
@checked
class Some:
    rank: PositiveInt = 2
    part: Fraction = 1.0
    least: Annotated[NonNegativeInt, AtMost("rank", less=1)] | None = None
    seen: str = "?"

    def __post_init__(self) -> None:
        object.__setattr__(self, "seen", f"{self.part}")


def test_a_whole_number_for_a_float_becomes_one():
    assert Some(part=1).seen == "1.0" and isinstance(build({"train": {"lr": 1}}).train.lr, float)
    assert isinstance(build({"method": {"name": "ditto", "prox_weight": 1}}).method.make().prox_weight, float)


def test_a_class_of_its_own_checks_runs_them_after_the_ranges():
    with pytest.raises(ValueError, match="least = 2: expected at most 1, as rank = 2"):
        Some(least=2)
    assert Some(least=1).least == 1 and Some(part=0.5).seen == "0.5"


def test_a_number_that_no_float_can_hold_is_out_of_range():
    with pytest.raises(ValueError, match="part = 1000"):
        Some(part=10**400)
