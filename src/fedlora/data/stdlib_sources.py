"""The sources of this Python's standard library: parsed, never run."""

import ast
import os
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
CHAPTER_OF = {module: chapter for chapter, modules in _CHAPTERS.items() for module in modules.split()}
"""The chapter of each module of the top level; others are not part of the reference."""


@dataclass(frozen=True)
class Source:
    """A module's dotted name, the chapter of the library reference that it belongs to, and its syntax tree."""

    module: str
    chapter: str
    tree: ast.Module


def sources() -> Iterator[Source]:
    """Yields the modules that have a chapter, ordered by file; a file that does not parse is left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _files(root):
        module = _module(path.relative_to(root))
        chapter = CHAPTER_OF.get(module.partition(".")[0])
        if chapter is not None and (tree := _tree(path)) is not None:
            yield Source(module, chapter, tree)


def inner(node: ast.AST) -> Iterator[ast.AST]:
    """Yields the statements directly in a statement, and the parts of one that hold statements, such as handlers."""
    for block in ("body", "orelse", "finalbody", "handlers", "cases"):
        yield from getattr(node, block, ())


def first_paragraph(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The first paragraph of a docstring in one line; empty without a docstring."""
    paragraph, _, _ = (ast.get_docstring(node) or "").partition("\n\n")
    return " ".join(paragraph.split())


def _files(root: Path) -> list[Path]:
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - _SKIPPED
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files)


def _module(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _tree(path: Path) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escape sequences in old modules
            return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None
