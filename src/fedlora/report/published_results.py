"""Published results of the methods, from `published_results.toml`."""

import tomllib
from collections.abc import Mapping, Sequence
from decimal import Decimal
from functools import cache
from importlib.resources import files
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedlora.methods.table import TABLE

Value = Annotated[Decimal, Field(allow_inf_nan=True)]
"""Figure with the digits of its source; nan if the source has no value."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    about: Annotated[list[str], Field(min_length=1)]
    """Methods whose pages show the entry."""
    source: str
    read: Literal["paper", "abstract", "code", "secondary"]
    """Type of the source; secondary: a text about the paper."""
    caveat: str = ""


class Study(_Entry):
    """Published figures: one value per method and benchmark."""

    model: str
    metric: str
    setting: str = ""
    benchmarks: Annotated[list[str], Field(min_length=1)]
    values: Annotated[dict[str, list[Value]], Field(min_length=1)]

    @model_validator(mode="after")
    def _complete(self) -> "Study":
        for name, values in self.values.items():
            if len(values) != len(self.benchmarks):
                raise ValueError(f"{self.source}: {name} has {len(values)} values for {len(self.benchmarks)} benchmarks")
            if all(value.is_nan() for value in values):
                raise ValueError(f"{self.source}: {name} has no value; remove it")
        return self


class Claim(_Entry):
    """Published claim without an accessible table."""

    claim: str


class Reported(BaseModel):
    """All entries. `others` has the display names of methods that are not in the method table."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    others: Mapping[str, str]
    study: Sequence[Study]
    claim: Sequence[Claim]

    @model_validator(mode="after")
    def _known(self) -> "Reported":
        for entry in (*self.study, *self.claim):
            names = {*entry.about, *(entry.values if isinstance(entry, Study) else ())}
            if unknown := names - {*TABLE, *self.others}:
                raise ValueError(f"{entry.source}: {sorted(unknown)} is neither a method here nor in [others]")
        return self

    def label(self, name: str) -> str:
        """Display name of a method, or of another entry of a table."""
        return name if name in TABLE else self.others[name]


@cache
def reported() -> Reported:
    """Reads the entries of `published_results.toml`.

    Raises:
        ValidationError: an entry is incomplete, or names an unknown method.
    """
    return read(files("fedlora.report").joinpath("published_results.toml").read_text(encoding="utf-8"))


def read(text: str) -> Reported:
    """Parses the entries in a TOML text; see `reported`."""
    return Reported.model_validate(tomllib.loads(text, parse_float=Decimal))
