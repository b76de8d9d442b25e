"""An entry of `[[wrap]]`: a wrapper by name, with its own settings."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from fedlora.config.hints import UnknownKey, nearest
from fedlora.method import AnyMethod
from fedlora.methods.wrap.table import WRAPPERS
from fedlora.ranges import validated


class WrapChoice(BaseModel):
    """A wrapper around the method, by name; all other keys are its own settings."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    name: str
    """The wrapper."""

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, given: Any) -> Any:
        """Adds the wrapper's defaults: a saved experiment must not depend on the defaults of another release."""
        name = given.get("name") if isinstance(given, Mapping) else None
        return {**WRAPPERS[name].settings(), **given} if isinstance(name, str) and name in WRAPPERS else given

    @model_validator(mode="after")
    def _known_wrapper_and_settings(self) -> "WrapChoice":
        if self.name not in WRAPPERS:
            raise ValueError(f"unknown wrapper {self.name!r}{nearest(self.name, WRAPPERS)}")
        allowed = WRAPPERS[self.name].settings()
        for key in self.model_extra or {}:
            if key not in allowed:
                raise UnknownKey(f"{self.name} has no setting {key!r}", key, allowed)
        try:
            self._settings()
        except ValueError as error:
            raise ValueError(f"wrap.{self.name}.{error}") from error
        return self

    def around(self, method: AnyMethod) -> AnyMethod:
        """The wrapper around this method."""
        return WRAPPERS[self.name].make(method, **self._settings())

    def _settings(self) -> dict[str, Any]:
        return validated(WRAPPERS[self.name].make, self.model_extra or {})
