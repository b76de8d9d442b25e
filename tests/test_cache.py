"""What is kept on disk from run to run."""

import pytest
import torch
from transformers import BertTokenizerFast

from fedlora.cache import cached
from fedlora.tasks.classification import Classification

from tiny import tiny_bert


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def never() -> bytes:
    raise AssertionError("made again")


def test_what_was_made_once_is_read_from_then_on(folder):
    assert cached("kind", ["a", "b"], lambda: b"made") == b"made"
    assert cached("kind", ["a", "b"], never) == b"made"
    assert cached("kind", ["ab"], lambda: b"other") == b"other"
    assert folder.stat().st_mode & 0o077 == 0 and all(file.stat().st_mode & 0o077 == 0 for file in folder.iterdir())


def test_a_damaged_file_is_made_again(folder):
    cached("kind", ["a"], lambda: b"made")
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert cached("kind", ["a"], lambda: b"made") == b"made"
    assert cached("kind", ["a"], never) == b"made"


def test_nothing_is_kept_where_nothing_can_be(folder, tmp_path, monkeypatch):
    folder.write_text("a file where the folder would be")
    assert cached("kind", ["a"], lambda: b"made") == b"made"
    monkeypatch.setenv("FEDLORA_CACHE", "")
    assert cached("kind", ["a"], lambda: b"made") == b"made"
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_tokens_from_the_cache_are_the_tokens(folder, tmp_path):
    tiny_bert(tmp_path / "bert")
    tokenizer = BertTokenizerFast.from_pretrained(tmp_path / "bert")
    columns = {"text": ["alpha beta", "gamma"], "label": [0, 1]}
    first, second = (Classification().encode(tokenizer, columns, 8) for _ in range(2))
    assert len(list(folder.iterdir())) == 1
    assert first.padding == second.padding and torch.equal(first.starts, second.starts)
    assert all(torch.equal(second.features[name], x) for name, x in first.features.items())
    Classification().encode(tokenizer, {**columns, "text": ["alpha", "beta gamma"]}, 8)
    assert len(list(folder.iterdir())) == 2
