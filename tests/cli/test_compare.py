"""The command compare."""

import json

import pytest
from commands import assert_refused

from fedlora import compare

from saved import scored, write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Directories of runs of two methods with two seeds each."""
    place = tmp_path_factory.mktemp("runs")
    return [
        write_run(
            place / f"{method}{seed}",
            [scored(1, accuracy + 0.01 * seed**2, {"c0": accuracy, "c1": accuracy + 0.1 * seed})],
            f"method.name={method}",
            f"seed={seed}",
        )
        for method, accuracy in (("fedit", 0.5), ("flora", 0.625))
        for seed in (0, 1)
    ]


def test_the_table_is_printed_with_its_notes(runs, command):
    code, printed, errors = command("compare", *runs[:3])
    assert (code, errors) == (0, "")
    assert all(text in printed for text in ("flora", "test accuracy", "0.505 ± 0.007", "held-out loss"))
    assert "flora: seeds 0, the baseline has 0, 1" in printed


@pytest.mark.parametrize("form", ["csv", "latex", "markdown", "json"])
def test_each_format_is_that_of_the_python_interface(form, runs, command, tmp_path):
    options = ("--metric", "loss", "--baseline", "flora", "--format", form)
    expected = getattr(compare(runs, baseline="flora", metrics=["loss"]), f"to_{form}")()
    assert command("compare", *runs, *options) == (0, expected, "")
    assert command("compare", *runs, *options, "--out", tmp_path / "out") == (0, "", "")
    assert (tmp_path / "out").read_text() == expected


def test_a_table_in_a_file_and_csv_have_the_notes_too(runs, command, tmp_path):
    assert command("compare", *runs[:3], "--out", tmp_path / "out") == (0, "", "")
    assert "flora: seeds 0" in (tmp_path / "out").read_text()
    _, printed, errors = command("compare", *runs[:3], "--format", "csv")
    assert "flora: seeds 0" in errors and "flora: seeds 0" not in printed


def test_a_run_by_training_can_be_compared(by_python, command):
    code, printed, _ = command("compare", by_python, "--format", "json")
    (case,) = json.loads(printed)["cases"]
    assert code == 0 and case["case"] == "fedit" and case["bytes_up"] > 0


def test_what_cannot_be_compared_is_refused_in_one_line(runs, command, tmp_path):
    assert_refused(command("compare", tmp_path), str(tmp_path), "expected the directory of a run", "sweep")
    assert_refused(command("compare", *runs, "--metric", "acuracy"), "'acuracy'", "did you mean 'accuracy'")
    assert_refused(command("compare", *runs, "--baseline", "fedt"), "'fedt'", "'fedit'")
    assert_refused(command("compare", *runs, "--out", tmp_path / "no" / "file"), "cannot be written")
