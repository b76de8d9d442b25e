import sys
from collections import Counter

import pytest

from fedlora.data.stdlib_docs import examples
from fedlora.data.stdlib_sources import CHAPTER_OF


@pytest.fixture(scope="module")
def rows():
    return examples()


def test_there_are_thousands_of_sentences_in_many_chapters(rows):
    counts = Counter(row["label"] for row in rows)
    assert 3000 < len(rows) < 9000
    assert len(counts) >= 10
    assert min(counts.values()) >= 50


def test_each_sentence_comes_once_on_one_line_with_41_to_300_characters(rows):
    texts = [row["text"] for row in rows]
    assert len(set(texts)) == len(texts)
    assert all(40 < len(text) <= 300 and text == " ".join(text.split()) for text in texts)


@pytest.mark.slow
def test_the_sentences_are_the_same_each_time_and_no_module_is_imported(rows):
    before = set(sys.modules)
    assert examples() == rows
    assert set(sys.modules) == before


def test_a_sentence_stands_in_the_module_named_as_its_user(rows):
    import textwrap

    own = [row["text"] for row in rows if row["user"] == "textwrap"]
    assert own
    for text in own:
        docs = [textwrap.__doc__, *(getattr(textwrap, name).__doc__ for name in textwrap.__all__)]
        methods = [getattr(method, "__doc__", None) for method in vars(textwrap.TextWrapper).values()]
        assert any(text in " ".join(doc.split()) for doc in [*docs, *methods] if doc)


def test_every_public_python_module_has_a_chapter():
    jokes_and_skipped = {"antigravity", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "this", "turtledemo"}
    for name in sorted(n for n in sys.stdlib_module_names if not n.startswith("_")):
        spec = sys.modules[name].__spec__ if name in sys.modules else _found(name)
        if spec and spec.origin and spec.origin.endswith(".py"):
            assert name in CHAPTER_OF or name in jokes_and_skipped


def _found(name):
    from importlib.machinery import PathFinder

    return PathFinder.find_spec(name)
