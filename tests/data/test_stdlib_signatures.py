import ast
import sys
from collections import Counter

import pytest

from fedlora.config.sections import Data
from fedlora.data.sources import load
from fedlora.data.stdlib_signatures import examples, rows, without_duplicates
from fedlora.data.stdlib_sources import CHAPTER_OF, Source
from fedlora.data.tables import find
from fedlora.tasks.causal_lm import CausalLM

MODULE = '''
"""A module that has a docstring of its own."""
def copy(src: str, dst, /, *names, follow=True) -> None:
    """Copy ``src``, e.g. a file, to :func:`dst`. Nothing is
    returned.

    More about it."""
async def wait():
    """Wait until something
    happens."""
try:
    import box
except ImportError:
    class Box(dict):
        """A box of one's own, which is a class."""
        @property
        def lid(self):
            """Whether the box has a lid on it."""
            def inner():
                """Only seen from within the function."""
        def __len__(self):
            """Return the number of things in the box."""
    class _Hidden:
        def open(self):
            """Open what cannot be seen from outside."""
def _hidden():
    """Hide everything that nobody should see."""
def usage(x):
    """usage(x) -> int. Return the number of uses."""
def session(x):
    """Try >>> session(1) in order to see. How it works."""
def short():
    """Be short."""
def long():
    """Be so long that a small model could not learn to write it in the tokens that an answer has at most, say."""
def undocumented():
    pass
'''


def of_module(text, name="box"):
    return list(rows(Source(name, "containers", ast.parse(text))))


def test_a_public_function_is_its_signature_and_the_first_sentence_about_it_without_markup():
    found = of_module(MODULE)
    assert {(row["chapter"], row["module"]) for row in found} == {("containers", "box")}
    assert [(row["prompt"], row["response"]) for row in found] == [
        ("def box.copy(src: str, dst, /, *names, follow=True):", "Copy src, e.g. a file, to dst."),
        ("async def box.wait():", "Wait until something happens."),
        ("def box.Box.lid(self):", "Whether the box has a lid on it."),
    ]


def test_a_private_module_and_a_long_signature_have_no_examples():
    assert of_module(MODULE, "box._inner") == []
    text = 'def f({}):\n    """Take many arguments at once."""'
    assert len(of_module(text.format("a, b"))) == 1
    assert of_module(text.format(", ".join(f"argument_{i}" for i in range(20)))) == []


def test_no_two_examples_have_one_prompt_or_the_same_words_in_their_responses():
    pairs = [("a", "Open it."), ("a", "Close it."), ("b", "Open, IT."), ("c", "Open it now.")]
    kept = without_duplicates({"prompt": prompt, "response": response} for prompt, response in pairs)
    assert [row["prompt"] for row in kept] == ["a", "c"]


@pytest.fixture(scope="module")
def found():
    """The examples of the whole library, from the cache if another test has read them."""
    table, _ = find("stdlib-signatures", None, None)
    return [dict(zip(table.names, row, strict=True)) for row in zip(*map(table.column, table.names), strict=True)]


def test_the_library_has_enough_functions_in_every_chapter(found):
    counts = Counter(row["chapter"] for row in found)
    assert counts.keys() == set(CHAPTER_OF.values())
    assert len(found) > 1500 and min(counts.values()) >= 30
    for row in found:
        assert all(text.strip() == text != "" and text.isprintable() for text in row.values())
        assert len(row["prompt"]) <= 140 and 20 <= len(row["response"]) <= 100


@pytest.mark.slow
def test_the_sources_are_read_the_same_each_time_and_no_module_is_imported(found):
    before = set(sys.modules)
    assert examples() == found
    assert set(sys.modules) == before


def test_no_response_and_no_prompt_is_in_the_training_and_in_the_test_set():
    data = Data(source="stdlib-signatures", prompt="prompt", response="response", user="chapter")
    columns = CausalLM().columns({"prompt", "response"})
    for seed in (0, 1):
        loaded = load(data, seed, columns)
        assert min(len(loaded.train), 10 * len(loaded.test)) > 1500
        assert set(loaded.train["user"]) == set(CHAPTER_OF.values())
        for column in ("prompt", "response"):
            assert not {*loaded.train[column]} & {*loaded.test[column]}
