"""Every method trains a language model."""

import math

import pytest

from fedlora.api import run
from fedlora.config.experiment import build
from fedlora.methods.table import TABLE
from tiny_lm import pair_rows, tiny_lm

LABELLED = {name for name, row in TABLE.items() if row.needs_labels}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    tiny_lm(home / "llama")
    pair_rows(home / "rows.jsonl", 24)
    return home


def trained(home, out, method, precision):
    return run(
        build(
            {
                "model": str(home / "llama"),
                "task": "causal-lm",
                "data": {"source": str(home / "rows.jsonl"), "prompt": "prompt", "response": "response"},
                "rounds": 1,
                "clients": {"count": 3, "partition": "iid"},
                "method": {"name": method},
                "train": {"max_length": 16, "batch_size": 4, "device": "cpu", "precision": precision},
            }
        ),
        out,
    )


@pytest.mark.full
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", sorted(TABLE.keys() - LABELLED))
def test_every_method_trains_a_language_model(home, tmp_path, method, precision):
    result = trained(home, tmp_path / "run", method, precision)
    assert len(result.rows[-1].accepted) == 3 and math.isfinite(result.rows[-1].train_loss)


def test_the_base_of_a_language_model_computes_in_bf16(home, tmp_path):
    low, full = (trained(home, tmp_path / name, "fedit", name) for name in ("bf16", "fp32"))
    assert low.rows[-1].train_loss == pytest.approx(full.rows[-1].train_loss, rel=0.02)
