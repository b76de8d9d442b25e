"""Every method on a real model and real sentences: it learns, and its exported adapter is what was evaluated."""

import gzip
import json
from pathlib import Path

import pytest

from fedlora import run
from fedlora.config.experiment import build
from fedlora.methods.table import TABLE

BANKING77 = Path(__file__).resolve().parents[2] / "shared" / "data" / "banking77"
INTENTS = (0, 11, 33, 51, 63)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BANKING77.is_dir(), reason=f"needs the data set banking77 in {BANKING77.parent}"),
]


@pytest.fixture(scope="module")
def five_intents(tmp_path_factory):
    """A folder with the training and test rows of five intents."""
    folder = tmp_path_factory.mktemp("banking77")
    for split in ("train", "test"):
        with gzip.open(BANKING77 / f"{split}.jsonl.gz", "rt") as file:
            rows = [row for row in map(json.loads, file) if row["label"] in INTENTS]
        (folder / f"{split}.jsonl").write_text(
            "".join(json.dumps({**row, "label": str(row["label"])}) + "\n" for row in rows)
        )
    return folder


@pytest.mark.parametrize("name", TABLE)
def test_it_learns_real_intents_on_a_real_model(name, five_intents, tmp_path):
    experiment = build(
        {
            "data": {
                "source": str(five_intents / "train.jsonl"),
                "test": str(five_intents / "test.jsonl"),
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
    assert result.rows[-1]["clients"]["accuracy"]["mean"] > 0.35, "five intents: chance is 0.2"
    assert all((folder / "adapter_model.safetensors").is_file() for folder in result.adapters.values())
