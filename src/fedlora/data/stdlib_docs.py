"""A data set that every Python installation includes: the docstrings of its standard library."""

import ast
from collections.abc import Iterator

from fedlora.data.stdlib_sources import first_paragraph, inner, sources

_SHORTEST, _LONGEST = 41, 300  # characters


def examples() -> list[dict[str, str]]:
    """The docstrings of this Python's standard library: text, label (chapter) and user (module).

    A text is the first paragraph of a module's, class's or function's docstring, if it has 41 to 300 characters;
    duplicates are removed. The result depends only on the version of Python.
    """
    found: dict[str, dict[str, str]] = {}
    for source in sources():
        for text in map(first_paragraph, _definitions(source.tree)):
            if _SHORTEST <= len(text) <= _LONGEST:
                found.setdefault(text, {"text": text, "label": source.chapter, "user": source.module})
    return list(found.values())


def _definitions(node: ast.AST) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node
    for child in inner(node):
        yield from _definitions(child)
