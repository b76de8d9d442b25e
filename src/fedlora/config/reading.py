"""Unvalidated tables of settings: from TOML files, and with overrides."""

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedlora.errors import UserError

SHORT_FORMS: Mapping[str, str] = {"data": "source", "task": "kind"}
"""Sections that may be one text instead of a table, and the setting that the text is: `task = "KIND"`."""


def read_table(path: Path) -> dict[str, Any]:
    """The tables in a TOML file, unvalidated.

    Raises:
        UserError: no such file, or no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: not readable as TOML: {error}") from error


def overridden(table: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of the table, with `section.key=value` overrides applied to it in their order.

    Raises:
        UserError: an override has no key or no value, or its key goes through a value that is not a table.
    """
    changed = dict(table)
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not dotted.strip().rpartition(".")[2]:
            raise UserError(f"--set {override!r}: expected KEY=VALUE, for example method.rank=4")
        try:
            value: Any = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()  # a bare word is a string
        _apply(changed, dotted.strip(), value, f"--set {override!r}")
    return changed


def with_settings(table: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the table, with these values by dotted key.

    Raises:
        UserError: a key goes through a value that is not a table.
    """
    changed = dict(table)
    for dotted, value in settings.items():
        _apply(changed, dotted, value, dotted)
    return changed


def _apply(table: dict[str, Any], dotted: str, value: Any, origin: str) -> None:
    *parents, key = dotted.split(".")
    if parents[:1] == ["wrap"] and len(parents) == 2:
        table["wrap"] = _with_wrapper(table.get("wrap", []), parents[1], key, value)
        return
    for parent in parents:
        inner = table.get(parent, {})  # copied before it is changed: the caller's table stays as it is
        if isinstance(inner, str) and parent in SHORT_FORMS:
            inner = {SHORT_FORMS[parent]: inner}
        if not isinstance(inner, dict):
            raise UserError(f"{origin}: {parent} is not a table")
        table[parent] = table = {**inner}
    table[key] = value


def _with_wrapper(entries: Any, name: str, key: str, value: Any) -> Any:
    """The list of wrappers with a setting of the one of this name, which is added as the outermost if it is missing."""
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        return entries  # rejected later, with the other invalid values
    if name not in [entry.get("name") for entry in entries]:
        entries = [*entries, {"name": name}]
    return [{**entry, key: value} if entry.get("name") == name else entry for entry in entries]
