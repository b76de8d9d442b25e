"""Reference of all settings, generated from the sections' annotations, defaults and docstrings.

    python -m fedlora.config.reference docs/settings.md

writes the page.
"""

import ast
import inspect
import json
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from fedlora.config.experiment import Experiment
from fedlora.config.hints import closest, same_word
from fedlora.config.method_choice import MethodChoice
from fedlora.config.sections import sections
from fedlora.config.wrap_choice import WrapChoice
from fedlora.errors import UserError
from fedlora.methods.table import TABLE
from fedlora.methods.wrap.table import WRAPPERS
from fedlora.ranges import AtMost, Range, found

_INTRO = """\
<!-- written by scripts/pages -->

# Settings

Every setting of `experiment.toml`, with its default. Each can be changed for one run with `--set KEY=VALUE`, for example
`--set train.lr=0.002`. `fedlora settings` prints this list, `fedlora settings KEY` one setting; `fedlora init` writes an
`experiment.toml` to start from. A setting without a default may be omitted."""
_OWN = "Settings of single methods, with the names of the methods that have them."
_COMMON = {"method.rank": "The LoRA rank, the largest that a client may have."}
"""Descriptions of settings for methods without a docstring for them."""
_WORDS: Mapping[Any, str] = {str: "text", bool: "true or false", WrapChoice: "a table"}


@dataclass(frozen=True)
class Setting:
    """One setting: its dotted key, its values in words, its default and an example as TOML, and its description.

    `default` is empty if the setting may be omitted; `methods` are the methods that have it, if not all.
    """

    key: str
    values: str
    default: str
    example: str
    text: str
    methods: tuple[str, ...] = ()

    @property
    def section(self) -> str:
        """Name of the TOML table, empty for the top level."""
        return self.key.rpartition(".")[0]

    @property
    def summary(self) -> str:
        """First sentence of the description."""
        return self.text.partition(". ")[0].rstrip(".") + "."

    @property
    def owners(self) -> str:
        """Names of `methods`, or of all other methods if those are fewer."""
        others = [name for name in TABLE if name not in self.methods]
        return f"all but {', '.join(others)}" if len(others) < len(self.methods) else ", ".join(self.methods)


def settings() -> list[Setting]:
    """All settings by section, with the methods' own settings at the end of `method`."""
    entries: list[Setting] = []
    for name, section in sections(Experiment).items():
        for key, field in section.model_fields.items():
            dotted = f"{name}.{key}" if name else key
            if dotted not in sections(Experiment):
                entries.append(_setting(dotted, section, key, field.get_default(call_default_factory=True)))
        if section is MethodChoice:
            entries += _methods_own()
    return [*entries, *_wrappers_own()]


def find(key: str) -> list[Setting]:
    """Settings with that key, several if methods differ in it, or all settings of the section of that name.

    Raises:
        UserError: unknown key; suggests the most similar ones.
    """
    if chosen := [one for one in settings() if key in (one.key, one.section)]:
        return chosen
    keys = list(dict.fromkeys(one.key for one in settings()))
    near = _nearest(key, keys)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "`fedlora settings` lists all settings"
    raise UserError(f"unknown setting {key!r}; {hint}")


def _nearest(key: str, keys: list[str]) -> list[str]:
    word = key.rpartition(".")[2]
    if same := same_word(word, keys):
        return same
    if alike := closest(key, keys):
        return [alike]
    alike = closest(word, [one.rpartition(".")[2] for one in keys])
    return same_word(alike, keys) if alike else []


def docstrings(cls: type) -> dict[str, str]:
    """Maps fields of the class and its base classes to the docstrings below them."""
    texts: dict[str, str] = {}
    for part in reversed(cls.__mro__):
        if part.__module__.startswith("fedlora."):
            texts |= _own_docstrings(part)
    return texts


@cache
def _own_docstrings(cls: type) -> dict[str, str]:
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    return {
        field.target.id: inspect.cleandoc(below.value.value)
        for field, below in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str)
    }


def page() -> str:
    """The reference as Markdown."""
    entries, parts = settings(), [_INTRO]
    for name, section in sections(Experiment).items():
        inside = [one for one in entries if one.section == name]
        parts += [
            f"## `[{name}]`" if name else "## Top level",
            (inspect.getdoc(section) or "").partition("\n\n")[0],
            _table(one for one in inside if not one.methods),
        ]
        if own := [one for one in inside if one.methods]:
            parts += [_OWN, _table(own)]
    for name, row in WRAPPERS.items():
        parts += [
            f"## `[[wrap]]` {name}",
            f"{row.summary[0].upper()}{row.summary[1:]} ({row.paper}). {inspect.cleandoc(row.make.__doc__ or '')}",
            _table(one for one in entries if one.section == f"wrap.{name}"),
        ]
    return "\n\n".join(parts) + "\n"


def _setting(dotted: str, cls: type, field: str, default: Any) -> Setting:
    told = docstrings(cls).get(field, _COMMON.get(dotted, ""))
    text, _, example = " ".join(told.split()).partition(" Example: ")
    given = "" if default in (None, {}, []) else json.dumps(default, ensure_ascii=False)
    return Setting(dotted, values(get_type_hints(cls, include_extras=True)[field]), given, example or given, text)


def _methods_own() -> list[Setting]:
    """Settings of individual methods; methods with an identical setting share one entry."""
    shared: dict[Setting, list[str]] = {}
    for name, row in TABLE.items():
        for field, default in row.settings().items():
            assert isinstance(row.make, type)
            shared.setdefault(_setting(f"method.{field}", row.make, field, default), []).append(name)
    return [replace(one, methods=tuple(names)) for one, names in shared.items()]


def _wrappers_own() -> list[Setting]:
    """All settings of the wrappers."""
    entries: list[Setting] = []
    for name, row in WRAPPERS.items():
        assert isinstance(row.make, type)
        entries += [_setting(f"wrap.{name}.{key}", row.make, key, default) for key, default in row.settings().items()]
    return entries


def values(hint: Any) -> str:
    """Describes the values allowed by an annotation.

    >>> values(list[Annotated[int, Range(ge=1)]] | Literal["auto"] | None)
    'a list, each entry a whole number of at least 1, or "auto"'
    """
    return ", or ".join(_alternatives(hint))


def _alternatives(hint: Any) -> Iterator[str]:
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        for part in parts:
            yield from _alternatives(part)
    elif kind is Literal:
        yield ", ".join(json.dumps(value) for value in parts)
    elif kind is list:
        yield f"a list, each entry {values(parts[0])}"
    elif kind is dict:
        yield f"a table, each value {values(parts[1])}"
    elif kind is Annotated:
        bounds = [f"at most `{most.setting}`" + f" - {most.less}" * bool(most.less) for most in found(hint, AtMost)]
        yield " and ".join([*(number.text(parts[0]) for number in found(hint, Range)), *bounds])
    elif hint is not NoneType:
        yield _WORDS[hint]


def _table(entries: Iterable[Setting]) -> str:
    lines = ["| setting | values | default | what it does |", "| --- | --- | --- | --- |"]
    for one in entries:
        names = f" ({one.owners})" if one.methods else ""
        example = "" if one.default else f" Example: `{one.example}`"
        default = f"`{one.default}`" if one.default else ""
        lines.append(f"| `{one.key}`{names} | {one.values} | {default} | {one.text}{example} |")
    return "\n".join(lines)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
