"""The message about an invalid experiment."""

import re

from pydantic import BaseModel, ValidationError

from fedlora.config.hints import UnknownKey, closest, other_key
from fedlora.config.sections import all_keys, sections


def error_message(error: ValidationError, experiment: type[BaseModel]) -> str:
    """The first problem in one line, with a suggestion; `experiment` is the class that was validated."""
    problems = error.errors()
    first = next((p for p in problems if p["type"] == "literal_error" and isinstance(p["input"], str)), problems[0])
    where = _key(first["loc"])
    if first["type"] == "extra_forbidden":
        *parents, key = (str(part) for part in first["loc"])
        allowed = sections(experiment)[".".join(parents)].model_fields
        return f"unknown key {where!r}{other_key(key, allowed, all_keys(experiment))}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        cause = first["ctx"]["error"]
        if isinstance(cause, UnknownKey):
            message += other_key(cause.key, cause.allowed, all_keys(experiment))
        return f"{where}: {message}" if where and not message.startswith((f"{where}.", f"{where} ")) else message
    if first["type"] == "range":  # a union has one for each alternative
        ranges = [p["ctx"]["range"] for p in problems if p["type"] == "range" and _key(p["loc"]) == where]
        message = f"expected {', or '.join(ranges)}"
    meant = closest(str(first["input"]), _words(first.get("ctx", {}).get("expected", "")))
    near = f"; did you mean {meant!r}?" if meant else ""
    value, may_be_rows = first["input"], first["loc"][:1] in ((), ("data",))  # rows are not quoted
    if isinstance(value, str | int | float | None) or (isinstance(value, list | dict) and not may_be_rows):
        return f"{where} = {_shortened(repr(value))}: {message}{near}"
    hint = "; rows are passed with run(..., data=rows)" if may_be_rows else ""
    return f"{where or 'an experiment'} is of type {type(value).__name__}: {message}{near}{hint}"


_UNION_TAG = re.compile(r"str|(list|dict|literal|function-before)[-\[].*")
"""Elements of pydantic's error paths that name the type tried in a union."""


def _key(location: tuple[int | str, ...]) -> str:
    """The dotted name of the setting at pydantic's error path."""
    return ".".join(str(part) for part in location if not _UNION_TAG.fullmatch(str(part)))


def _words(expected: str) -> list[str]:
    return [word.strip("' ") for word in expected.replace(" or ", ",").split(",") if word.strip("' ")]


def _shortened(text: str) -> str:
    return text if len(text) <= 100 else text[:99] + "…"
