"""A data set that every Python installation includes: signatures of its standard library, with a sentence about each."""

import ast
import re
from collections.abc import Iterator

from fedlora.data.stdlib_sources import Source, first_paragraph, inner, sources

_LONGEST_PROMPT = 140  # characters, about 50 tokens
_SHORTEST, _LONGEST = 20, 100  # characters of a response, which is thus at most about 25 tokens
_MARKUP = re.compile(r"(?::\w+:)?`+")
_SENTENCE = re.compile(r"[A-Z][^>]*?(?<!e\.g)(?<!i\.e)\.(?= |$)")  # a `>` is part of a signature or of a session


def examples() -> list[dict[str, str]]:
    """Functions of this Python's standard library: prompt, response, chapter and module.

    The prompt is a signature with the name of the module, such as `def glob.escape(pathname):`, the response the first
    sentence of the docstring, without markup. Names with a leading underscore are left out, as are functions without a
    sentence of 20 to 100 characters, and signatures beyond 140. No two prompts are equal, and no two responses have the
    same words. The result depends only on the version of Python.
    """
    return without_duplicates(row for source in sources() for row in rows(source))


def rows(source: Source) -> Iterator[dict[str, str]]:
    """Yields the examples in a module."""
    if _private(*source.module.split(".")):
        return
    for name, function in _functions(source.tree, source.module):
        keyword = "async def" if isinstance(function, ast.AsyncFunctionDef) else "def"
        prompt = f"{keyword} {name}({ast.unparse(function.args)}):"
        sentence = _SENTENCE.match(_MARKUP.sub("", first_paragraph(function)))
        response = sentence[0] if sentence else ""
        fits = len(prompt) <= _LONGEST_PROMPT and _SHORTEST <= len(response) <= _LONGEST
        if fits and (prompt + response).isprintable():
            yield {"prompt": prompt, "response": response, "chapter": source.chapter, "module": source.module}


def without_duplicates(found: Iterator[dict[str, str]]) -> list[dict[str, str]]:
    """The first of the examples with one prompt, or with the same words in their responses."""
    seen, kept = set[str](), []
    for row in found:
        keys = {row["prompt"], " ".join(re.findall(r"\w+", row["response"].lower()))}
        if not keys & seen:
            seen |= keys
            kept.append(row)
    return kept


def _functions(node: ast.AST, name: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yields the public functions and methods in a node with this name, and their names; not those in functions."""
    for child in inner(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            if not _private(child.name):
                yield f"{name}.{child.name}", child
        elif not isinstance(child, ast.ClassDef):
            yield from _functions(child, name)
        elif not _private(child.name):
            yield from _functions(child, f"{name}.{child.name}")


def _private(*names: str) -> bool:
    return any(name.startswith("_") for name in names)
