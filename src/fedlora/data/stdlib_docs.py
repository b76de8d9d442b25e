"""A data set that every Python installation includes: the docstrings of its standard library."""

import ast
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

_SHORTEST, _LONGEST = 41, 300  # characters

_SKIPPED = frozenset({"__pycache__", "dist-packages", "site-packages", "test", "tests"})

# The chapters of the Python library reference, with small neighboring chapters merged; modules removed since Python 3.11
# and the pure Python twins (_pydecimal) are placed by subject.
_CHAPTERS = {
    "text and binary data": "codecs difflib encodings re rlcompleter sre_compile sre_constants sre_parse string stringprep "
    "struct textwrap",
    "data types": "_collections_abc _pydatetime _strptime _weakrefset bisect calendar collections copy datetime enum "
    "graphlib heapq pprint reprlib types weakref zoneinfo",
    "numeric and functional": "_pydecimal _pylong decimal fractions functools numbers operator random statistics",
    "files and persistence": "_compat_pickle configparser copyreg csv dbm filecmp fileinput fnmatch genericpath glob "
    "linecache netrc ntpath nturl2path pathlib pickle plistlib posixpath shelve shutil sqlite3 stat tempfile tomllib "
    "xdrlib",
    "compression and cryptography": "_compression bz2 compression crypt gzip hashlib hmac lzma secrets tarfile zipfile",
    "operating system": "_pyio argparse cmd ctypes curses getopt getpass io logging optparse os pipes platform pty shlex "
    "tty",
    "concurrency": "_threading_local concurrent contextvars multiprocessing queue sched subprocess threading",
    "networking": "asynchat asyncio asyncore selectors signal socket ssl",
    "internet data and markup": "_markupbase base64 email html json mailbox mailcap mimetypes quopri uu xml",
    "internet protocols": "cgi cgitb ftplib http imaplib ipaddress nntplib poplib smtpd smtplib socketserver telnetlib "
    "urllib uuid webbrowser wsgiref xmlrpc",
    "multimedia, locales and gui": "aifc chunk colorsys gettext imghdr locale sndhdr sunau tkinter turtle wave",
    "development and packaging": "distutils doctest pydoc typing unittest venv zipapp",
    "debugging and profiling": "bdb cProfile pdb profile profiling pstats timeit trace tracemalloc",
    "runtime services": "__future__ _aix_support _android_support _apple_support _bootsubprocess _colorize _ios_support "
    "_osx_support _py_abc _py_warnings _pyrepl _sitebuiltins abc annotationlib code codeop contextlib dataclasses inspect "
    "site sysconfig traceback warnings",
    "imports and language services": "_ast_unparse _opcode_metadata ast compileall dis imp importlib keyword modulefinder "
    "opcode pickletools pkgutil py_compile pyclbr runpy symtable tabnanny token tokenize zipimport",
}
_CHAPTER_OF = {module: chapter for chapter, modules in _CHAPTERS.items() for module in modules.split()}


def examples() -> list[dict[str, str]]:
    """The docstrings of this Python's standard library: text, label (chapter) and user (module).

    A text is the first paragraph of a module's, class's or function's docstring, if it has 41 to 300 characters;
    duplicates are removed. The sources are parsed, never run, so the result depends only on the version of Python.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, dict[str, str]] = {}
    for path in _sources(root):
        module = _module(path.relative_to(root))
        chapter = _CHAPTER_OF.get(module.partition(".")[0])
        if chapter is None:
            continue
        for text in _paragraphs(path):
            if _SHORTEST <= len(text) <= _LONGEST:
                found.setdefault(text, {"text": text, "label": chapter, "user": module})
    return list(found.values())


def _sources(root: Path) -> list[Path]:
    sources = []
    for folder, inner, names in os.walk(root):
        inner[:] = set(inner) - _SKIPPED
        sources += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(sources)


def _module(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _paragraphs(path: Path) -> Iterator[str]:
    """Yields the first paragraph of each docstring in a source file, in file order; nothing if the file does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escape sequences in old modules
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    for node in _definitions(tree):
        paragraph, _, _ = (ast.get_docstring(node) or "").partition("\n\n")
        yield " ".join(paragraph.split())


def _definitions(node: ast.AST) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node
    for block in ("body", "orelse", "finalbody", "handlers", "cases"):
        for child in getattr(node, block, ()):
            yield from _definitions(child)
