"""Ranges of settings as annotations, `density: Fraction = 0.25`, and validation of a method's settings against them."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

C = TypeVar("C", bound=type)
M = TypeVar("M")


@dataclass(frozen=True)
class Range:
    """Bounds of an int or a float, named as in pydantic. NaN, infinity, bool and text are never in range."""

    gt: int | float | None = None
    ge: int | float | None = None
    lt: int | float | None = None
    le: int | float | None = None

    def text(self, kind: type) -> str:
        """Description of the range in words.

        >>> Range(gt=0, le=1).text(float)
        'a number above 0 and at most 1'
        """
        words = {"above": self.gt, "of at least": self.ge, "below": self.lt, "at most": self.le}
        bounds = " and ".join(f"{word} {bound:g}" for word, bound in words.items() if bound is not None)
        bounded = self.lt is not None or self.le is not None
        return f"a{' whole' if kind is int else '' if bounded else ' finite'} number {bounds}".rstrip()

    def check(self, kind: type, value: Any) -> Any:
        """Returns the value, as a float if `kind` is float.

        Raises:
            PydanticCustomError: it is out of range.
        """
        number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        if not number or not self._contains(value):
            raise PydanticCustomError("range", "expected {range}", {"range": self.text(kind)})
        return kind(value)

    def _contains(self, value: int | float) -> bool:
        try:
            finite = math.isfinite(value)
        except OverflowError:  # an int beyond the range of float
            finite = False
        return (
            finite
            and (self.gt is None or value > self.gt)
            and (self.ge is None or value >= self.ge)
            and (self.lt is None or value < self.lt)
            and (self.le is None or value <= self.le)
        )

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(partial(self.check, source), handler(source))


@dataclass(frozen=True)
class AtMost:
    """Upper bound: another setting minus `less`, a field of the same class or an experiment's setting by dotted name."""

    setting: str
    less: int = 0


PositiveInt = Annotated[int, Range(ge=1)]
NonNegativeInt = Annotated[int, Range(ge=0)]
PositiveFloat = Annotated[float, Range(gt=0)]
NonNegativeFloat = Annotated[float, Range(ge=0)]
FiniteFloat = Annotated[float, Range()]
Fraction = Annotated[float, Range(gt=0, le=1)]
UnitInterval = Annotated[float, Range(ge=0, le=1)]


def checked(cls: C) -> C:
    """Class decorator, below `@dataclass`, that validates the fields of each instance against their annotations.

    Construction raises a ValueError if a field is out of range or of the wrong type, see `validated`; the class's own
    `__post_init__` runs afterwards.
    """
    own = getattr(cls, "__post_init__", None)

    def __post_init__(self: Any) -> None:
        settings = {name: value for name, value in vars(self).items() if name != "inner"}
        for name, value in validated(type(self), settings).items():
            object.__setattr__(self, name, value)
        check_bounds(self, vars(self))
        if own is not None:
            own(self)

    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    return cls


def validated(cls: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Converts the values to the types of the fields of that name in `cls`.

    Raises:
        ValueError: a value is out of range or of the wrong type; names field, value and allowed values.
    """
    adapters, valid = _adapters(cls), {}
    for name, value in values.items():
        try:
            valid[name] = adapters[name].validate_python(value)
        except ValidationError as error:
            raise ValueError(f"{name} = {value!r}: {error.errors()[0]['msg']}") from None
    return valid


def check_bounds(settings: Any, others: Mapping[str, Any]) -> None:
    """Checks the fields of `settings` against the `AtMost` in their annotations, if `others` has the bounding setting.

    Raises:
        ValueError: a field is above its bound; names both.
    """
    for name, hint in get_type_hints(type(settings), include_extras=True).items():
        for bound in found(hint, AtMost):
            value, most = getattr(settings, name), others.get(bound.setting)
            if value is not None and most is not None and value > most - bound.less:
                raise ValueError(f"{name} = {value}: expected at most {most - bound.less}, as {bound.setting} = {most}")


def found(hint: Any, kind: type[M]) -> Iterator[M]:
    """Metadata of that kind in an annotation, including inside unions and containers."""
    if get_origin(hint) is Annotated:
        yield from (item for item in hint.__metadata__ if isinstance(item, kind))
    for part in get_args(hint):
        yield from found(part, kind)


def alternatives(cls: Any, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Yields each field with the values that can switch something on or off: all of a choice, the ends of a range."""
    hints = get_type_hints(cls, include_extras=True)
    for name in names:
        yield from ((name, value) for value in _switches(hints[name]))


def _switches(hint: Any) -> Iterator[Any]:
    if hint is bool:
        yield from (False, True)
    elif get_origin(hint) is Literal:
        yield from get_args(hint)
    elif get_origin(hint) is Annotated:
        kind, *metadata = get_args(hint)
        ends = [end for item in metadata if isinstance(item, Range) for end in (item.ge, item.le)]
        yield from (kind(end) for end in ends if end is not None)
    else:
        for part in get_args(hint):
            yield from _switches(part)


@cache
def _adapters(cls: Any) -> dict[str, Any]:
    """An adapter for each field, except the wrapped method of a wrapper, which is no setting."""
    hints = {name: hint for name, hint in get_type_hints(cls, include_extras=True).items() if name != "inner"}
    return {name: TypeAdapter(hint, config=ConfigDict(strict=True)) for name, hint in hints.items()}
