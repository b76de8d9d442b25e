"""The section `method`: a method by name, with its own settings."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from fedlora.config.hints import UnknownKey, nearest
from fedlora.method import AnyMethod
from fedlora.methods.row import Head, Row, Weights
from fedlora.methods.table import TABLE
from fedlora.ranges import validated

_REMOVED = {
    "by_examples": "weights = 'examples' or 'uniform'",
    "pull": "prox_weight",
    "apart": "min_silhouette",
    "normaliser": "normalizer",
    "most_tasks": "max_tasks",
}
"""Settings of methods in earlier releases."""


class MethodChoice(BaseModel):
    """The method, by name; all other keys are its own settings."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    name: str = "fedit"
    """The method; `fedlora methods` lists them."""
    head: Head | None = None
    """The task head: frozen, averaged, local (trained, never sent), or method-managed (fl-tac only). If omitted, as in
    the method's paper.

    Example: "averaged"
    """
    norms: bool | None = None
    """Whether the layer norms are part of the task head, and hence frozen, averaged or local like the head. If omitted,
    as in the method's paper.

    Example: true
    """
    weights: Weights | None = None
    """The clients' weights in the means of factors and heads: their numbers of examples, or uniform. If omitted, the
    method's default (see its page). With `privacy.unit`, uniform unless `privacy.public_counts` is true.

    Example: "uniform"
    """

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, given: Any) -> Any:
        """Adds the method's defaults: a saved experiment must not depend on the defaults of another release."""
        name = given.get("name", cls.model_fields["name"].default) if isinstance(given, Mapping) else None
        if not isinstance(name, str) or name not in TABLE:
            return given
        row = TABLE[name]
        defaults = {"head": row.head, "norms": row.norms, "weights": row.weights, **row.settings()}
        return defaults | {
            key: value for key, value in given.items() if value is not None or key not in ("head", "norms", "weights")
        }

    @model_validator(mode="after")
    def _known_method_and_settings(self) -> "MethodChoice":
        if self.name not in TABLE:
            raise ValueError(f"unknown method {self.name!r}{nearest(self.name, TABLE)}")
        row = TABLE[self.name]
        for key in self.model_extra or {}:
            if key in _REMOVED:
                raise ValueError(f"{self.name} has no setting {key!r} any more; set {_REMOVED[key]}")
            if key not in row.settings():
                raise UnknownKey(f"{self.name} has no setting {key!r}", key, [*row.settings(), "head", "norms", "weights"])
        if self.head == "method-managed" and row.head != "method-managed":
            raise ValueError(
                f"head = 'method-managed': {self.name} does not treat the head itself; allowed: frozen, averaged, local"
            )
        try:
            method = self.make()
        except ValueError as error:
            raise ValueError(f"method.{error}") from error
        if method.trains_whole_model and self.head != "averaged":
            raise ValueError(
                f"head = {self.head!r}: {self.name}, as set, averages all parameters, the head included; allowed: averaged"
            )
        return self

    @property
    def row(self) -> Row:
        """The method's row in the table."""
        return TABLE[self.name]

    @property
    def with_norms(self) -> bool:
        """Whether layer norms are trained with the head."""
        return bool(self.norms)

    @property
    def whole_model(self) -> bool:
        """Whether all parameters of the model are trained."""
        return self.make().trains_whole_model

    @property
    def uniform(self) -> bool:
        """Whether all clients have the same weight in a mean."""
        return self.weights == "uniform"

    @property
    def rank(self) -> int:
        """The largest rank of a client."""
        return int((self.model_extra or {})["rank"])

    def make(self) -> AnyMethod:
        """The method with these settings, without its head wrapper."""
        return self.row.make(**self.row.fixed_settings, **validated(self.row.make, self.model_extra or {}))
