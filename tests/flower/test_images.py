"""An image classification over Flower."""

import pytest
import tomli_w

from fedlora.api import run
from fedlora.config.experiment import build
from tiny_images import tiny_npz, tiny_vit

from lives import fedlora, table
from wired import assert_same_runs

pytestmark = [pytest.mark.flower, pytest.mark.timeout(600)]


def test_over_flower_an_image_classification_is_bit_for_bit_the_simulated_one(tmp_path):
    tiny_vit(tmp_path / "vit")
    given = {"model": str(tmp_path / "vit"), "data": {"source": str(tiny_npz(tmp_path / "rows.npz", 48))}}
    task = {"kind": "image-classification", "augment": "flip"}
    what = table(tmp_path, 2, rounds=2, task=task, **given)
    file, path = tmp_path / "experiment.toml", tmp_path / "run"
    file.write_text(tomli_w.dumps(what))
    process = fedlora("deploy", "local", "--clients", "2", file, "--out", path)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "accuracy" in out
    assert_same_runs(run(build(what), tmp_path / "simulated").folder, path)
