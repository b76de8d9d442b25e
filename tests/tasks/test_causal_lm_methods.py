"""Every method trains a language model; each kind of adapter part, packed with other clients and padded alone."""

import math

import pytest

from fedlora.api import run
from fedlora.config.experiment import build
from fedlora.methods.table import TABLE
from tiny_lm import pair_rows, tiny_lm

KINDS = ["fedit", "fed-sb", "ravan", "fedlease", "florg", "full-ft"]
"""A method for each kind of part."""
LABELLED = {name for name, row in TABLE.items() if row.needs_labels}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    tiny_lm(home / "llama")
    pair_rows(home / "rows.jsonl", 24)
    return home


def trained(home, out, method, norms=False, precision="fp32", **train):
    settings = {"max_length": 16, "batch_size": 4, "device": "cpu", "precision": precision, "batches": "random", **train}
    return run(
        build(
            {
                "model": str(home / "llama"),
                "task": "causal-lm",
                "data": {"source": str(home / "rows.jsonl"), "prompt": "prompt", "response": "response"},
                "rounds": 1,
                "clients": {"count": 3, "partition": "iid"},
                "method": {"name": method, "norms": norms},
                "train": settings,
            }
        ),
        out,
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", KINDS)
def test_each_kind_of_part_trains_the_same_packed_together_and_padded_alone(home, tmp_path, method):
    norms = method == "fedit"  # dense parameters, too
    together = trained(home, tmp_path / "together", method, norms)
    alone = trained(home, tmp_path / "alone", method, norms, packed=False, clients_per_step=1)
    one, other = together.rows[-1], alone.rows[-1]
    assert one.train_loss == pytest.approx(other.train_loss, rel=1e-4)
    if one.global_ is not None:
        assert one.global_["loss"] == pytest.approx(other.global_["loss"], rel=1e-3)
        assert one.global_["loss"] != together.rows[0].global_["loss"]
    assert set(one.accepted) == {"000", "001", "002"}


@pytest.mark.full
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", sorted(TABLE.keys() - LABELLED - {*KINDS}))
def test_every_other_method_trains_a_language_model(home, tmp_path, method, precision):
    result = trained(home, tmp_path / "run", method, precision=precision)
    assert len(result.rows[-1].accepted) == 3 and math.isfinite(result.rows[-1].train_loss)


def test_the_base_of_a_language_model_computes_in_bf16(home, tmp_path):
    low, full = (trained(home, tmp_path / name, "fedit", precision=name) for name in ("bf16", "fp32"))
    assert low.rows[-1].train_loss == pytest.approx(full.rows[-1].train_loss, rel=0.02)
