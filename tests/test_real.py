"""Every method on a real model and real sentences: it learns, and its adapters are exported."""

import json

import pytest

from fedlora import run
from fedlora.config.experiment import build
from fedlora.data.stdlib_docs import examples
from fedlora.methods.table import TABLE

CHAPTERS = (
    "compression and cryptography",
    "concurrency",
    "internet protocols",
    "multimedia, locales and gui",
    "numeric and functional",
)
OF_EACH = 150  # sentences, where a chapter has as many

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def five_chapters(tmp_path_factory):
    """A folder with rows of five chapters of the standard library's documentation; every third one is for testing."""
    folder, docs = tmp_path_factory.mktemp("docs"), examples()
    chapters = [[row for row in docs if row["label"] == chapter][:OF_EACH] for chapter in CHAPTERS]
    for split, places in (("train", {1, 2}), ("test", {0})):
        rows = [row for chapter in chapters for i, row in enumerate(chapter) if i % 3 in places]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("name", TABLE)
def test_it_learns_real_sentences_on_a_real_model(name, five_chapters, tmp_path):
    experiment = build(
        {
            "data": {
                "source": str(five_chapters / "train.jsonl"),
                "test": str(five_chapters / "test.jsonl"),
                "rows": 240,
                "test_rows": 100,
            },
            "rounds": 4,
            "clients": {"count": 4, "partition": "iid", "held_out": 0.2},
            "method": {"name": name, "rank": 4, "head": "local" if TABLE[name].personal else "averaged"},
            "train": {"lr": 5e-3, "max_length": 32},
            "evaluate": {"every": 4},
        }
    )
    result = run(experiment, tmp_path / "run")
    assert result.rows[-1].clients["accuracy"].mean > 0.35, "five chapters: chance is 0.2"
    assert all((folder / "adapter_model.safetensors").is_file() for folder in result.adapters.values())
