"""The sweep files of this repository."""

from pathlib import Path

import pytest

from fedlora.config.sweep import Sweep

ROOT = Path(__file__).parents[2] / "benchmarks"
FILES = [ROOT / "methods.toml", *sorted((ROOT / "claims").glob("?.toml"))]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_sweep_of_the_benchmarks_searches_a_rate_for_each_point_and_has_several_seeds(file):
    sweep = Sweep.load(file)
    assert len(sweep.points) > 2 and len(sweep.seeds) > 1
    assert all(len(point.candidates) > 1 and "train.lr" in point.candidates[0] for point in sweep.points)
