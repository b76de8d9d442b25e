"""Comparisons as tables: terminal, CSV, JSON, Markdown, LaTeX, pandas and plots."""

import csv
import io
import json
import math
import re

import pytest
from rich.console import Console

from fedlora import Comparison
from fedlora.report.comparison_formats import for_terminal
from fedlora.report.figures import ComparedCase, Difference, Figure
from fedlora.report.intervals import Interval
from fedlora.runs.saved_run import SavedRun

from saved import scored, write_run

LABEL = r"a_b & 50% #1 {x} ~^\$|<>" + "\x1b[2J"


def difference(low, high, mean=0.012, seeds=3):
    return Difference(seeds, mean, Interval(low, high))


def comparison(*figures, notes=("a note with 5% & \x1b",)):
    """Cases a, b, ... with these test accuracies; the last one has the odd label."""
    labels = [*"abc"[: len(figures) - 1], LABEL]
    cases = [
        ComparedCase(label, {}, {"global.accuracy": figure, "bytes_up": Figure(1500.0, 0.0)}, {"train.lr": 0.003})
        for label, figure in zip(labels, figures, strict=True)
    ]
    return Comparison(cases, "a", ["accuracy"], notes, {"loss"})


BASE, BETTER = Figure(0.82, 0.004), Figure(0.832, 0.004, difference(0.004, 0.020))
UNCLEAR, WORSE = Figure(0.832, 0.004, difference(-0.004, 0.028)), Figure(0.7, 0.01, difference(-0.2, -0.1, mean=-0.12))
ONE_SEED = Figure(0.832, None, difference(0.004, 0.020, seeds=1))


def test_numbers_have_a_mean_a_deviation_a_signed_difference_and_its_interval():
    text = comparison(BASE, WORSE).to_markdown()
    assert "| 0.820 ± 0.004 |" in text and "| 0.700 ± 0.010 | -0.120 [-0.200, -0.100] |" in text
    assert "| 0.832 | +0.012 [0.004, 0.020] |" in comparison(BASE, ONE_SEED).to_markdown()


def test_the_baseline_of_differences_is_named_in_its_line():
    found = comparison(BASE, BETTER, WORSE)
    lines = [[cell.text for cell in row] for row in found.tables()[0].rows]
    assert [one[0] for one in lines if "baseline" in one] == [found.baseline]
    assert "baseline" not in comparison(BASE).to_markdown()


@pytest.mark.parametrize(
    ("mean", "std", "plain", "latex"),
    [
        (0.25, 0.0, "0.25 ± 0", r"$0.25 \pm 0$"),
        (1.23e-7, 4e-9, "1.2e-07 ± 4e-09", r"$1.2 \cdot 10^{-7} \pm 4 \cdot 10^{-9}$"),
    ],
)
def test_aggregation_errors_have_two_digits_whatever_their_size(mean, std, plain, latex):
    cases = [ComparedCase("a", {}, {"aggregation_error": Figure(mean, std)}, {})]
    found = Comparison(cases, "a", [], [], ())
    assert f"| {plain} |" in found.to_markdown() and latex in found.to_latex()


def test_an_undefined_metric_is_said_and_nothing_is_bold():
    undefined = Figure(math.nan, math.nan, Difference(3, math.nan, None))
    assert "| undefined | undefined |" in comparison(BASE, undefined).to_markdown()
    assert "mathbf" not in comparison(BASE, undefined, BETTER).to_latex()


def test_of_a_loss_the_smallest_is_the_best_and_the_top_decile_the_worst():
    figures = {"global.loss": WORSE, "clients.loss.worst_decile": BASE}
    cases = [ComparedCase("a", {}, {"global.loss": BASE}, {}), ComparedCase("b", {}, figures, {})]
    text = Comparison(cases, "a", ["loss"], [], {"loss"}).to_latex()
    assert r"\mathbf{0.700" in text and "top decile" in text and "bottom decile" not in text


def test_columns_that_no_case_has_are_left_out():
    (header, *_) = comparison(BASE, BETTER).to_markdown().splitlines()
    assert header == "| case | seeds | test accuracy | test difference |"


def test_markdown_has_as_many_cells_in_every_line_and_the_notes_as_a_list():
    text = comparison(BASE, BETTER).to_markdown()
    first, costs, notes = text.split("\n\n")
    for table in (first, costs):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert notes == "- a note with 5% & \\x1b\n" and "\x1b" not in text


@pytest.mark.parametrize(
    ("figures", "bold"),
    [
        ((BASE, BETTER), ["0.832"]),
        ((BASE, UNCLEAR), []),
        ((BASE, WORSE), ["0.820"]),
        ((BASE, ONE_SEED), []),
        ((BASE, WORSE, Figure(0.81, 0.01, difference(-0.1, 0.1))), []),
        ((BASE, BETTER, WORSE), ["0.832"]),
    ],
)
def test_the_best_mean_is_bold_only_if_the_interval_of_several_seeds_excludes_zero(figures, bold):
    assert re.findall(r"\\mathbf\{([\d.]+)", comparison(*figures).to_latex()) == bold


@pytest.mark.parametrize(
    ("figures", "bold"),
    [
        ((BASE, Figure(0.9, 0.01, difference(-0.2, -0.1, mean=-0.15))), []),  # better over other seeds only
        ((BASE, Figure(0.9, 0.01, difference(0.01, 0.02)), Figure(0.85, 0.01, difference(0.03, 0.05, mean=0.04))), []),
        ((Figure(0.9, 0.01), BETTER), []),
    ],
)
def test_a_mean_over_other_seeds_is_bold_only_if_it_is_also_the_best_over_the_common_ones(figures, bold):
    assert re.findall(r"\\mathbf\{([\d.]+)", comparison(*figures).to_latex()) == bold


def test_latex_is_balanced_escaped_and_has_as_many_columns_as_declared():
    text = comparison(BASE, WORSE).to_latex()
    comments = [line for line in text.splitlines() if line.startswith("%")]
    assert comments == ["% a note with 5% & \\x1b"]
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert body.isascii()
    assert body.count(r"\begin{tabular}") == body.count(r"\end{tabular}") == 2
    bare = re.sub(r"\\[\\&%$#_{}]", "", body)  # without escaped characters and ends of lines
    assert not re.search(r"[%#~|<>_]", bare) and bare.count("$") % 2 == 0
    assert "^" not in bare.replace("10^{", "")
    depth = 0
    for character in bare:
        depth += (character == "{") - (character == "}")
        assert depth >= 0
    assert depth == 0
    for columns, rows in re.findall(r"\\begin\{tabular\}\{(l\w*)\}\n(.*?)\\end\{tabular\}", body, re.DOTALL):
        lines = [line for line in rows.splitlines() if line.endswith(r"\\")]
        assert len(lines) == 3
        assert all(len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1 for line in lines)


def test_csv_has_a_column_for_each_number_and_parses_to_the_same_values():
    (base, other) = csv.DictReader(io.StringIO(comparison(BASE, BETTER).to_csv()))
    assert other["case"] == LABEL and float(other["global.accuracy"]) == 0.832
    assert [float(other[f"global.accuracy.{part}"]) for part in ("std", "difference", "low", "high")] == [
        0.004,
        0.012,
        0.004,
        0.020,
    ]
    assert base["global.accuracy.low"] == "" and base["chosen.train.lr"] == "0.003"
    assert list(base)[:4] == ["case", "seeds", "global.accuracy", "global.accuracy.std"]


def test_json_has_the_cases_the_baseline_and_the_notes():
    found = json.loads(comparison(BASE, BETTER).to_json())
    assert (found["baseline"], found["notes"]) == ("a", ["a note with 5% & \x1b"])
    assert found["cases"][1]["global.accuracy.high"] == 0.020 and "global.accuracy.low" not in found["cases"][0]


def test_the_terminal_shows_the_tables_and_every_note_without_control_characters():
    console = Console(file=io.StringIO(), width=200)
    found = comparison(BASE, BETTER)
    console.print(for_terminal(found.tables(), found.notes))
    text = console.file.getvalue()
    assert "0.832 ± 0.004" in text and "+0.012 [0.004, 0.020]" in text and "1.5 kB" in text and "a note" in text
    assert "\x1b" not in text


def test_a_data_frame_has_the_columns_of_the_csv():
    found = comparison(BASE, BETTER)
    frame = found.to_pandas()
    assert list(frame) == next(csv.reader(io.StringIO(found.to_csv())))
    assert frame["global.accuracy.low"].isna().tolist() == [True, False]


@pytest.fixture
def plotted(tmp_path, monkeypatch):
    """Two cases of two seeds and three rounds, the second case without a test set; and a backend without a window."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    cases = []
    for label, absent in (("a", {}), ("b", {"global_": None})):
        runs = {}
        for seed in (0, 1):
            rows = [scored(i, 0.1 * i + 0.2 * seed, {"c0": 0.3, "c1": 0.5 + seed}, **absent) for i in (1, 2, 3)]
            runs[seed] = SavedRun.read(write_run(tmp_path / f"{label}{seed}", rows, f"seed={seed}"))
        cases.append(ComparedCase(label, runs, {}, {}))
    yield Comparison(cases, "a", ["accuracy"], [], {"loss"})
    pyplot.close("all")


def test_a_plot_has_the_mean_by_round_and_a_band_of_one_standard_deviation(plotted):
    axes = plotted.plot()
    (line,), (band,) = axes.lines, axes.collections
    assert line.get_label() == "a" and axes.get_ylabel() == "test accuracy"
    assert list(line.get_xdata()) == [1, 2, 3] and line.get_ydata() == pytest.approx([0.2, 0.3, 0.4])
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((0.2 - 0.02**0.5, 0.4 + 0.02**0.5))


def test_a_plot_without_scores_on_a_test_set_shows_those_on_held_out_examples(plotted):
    axes = Comparison(plotted.cases[1:], "b", ["accuracy"], [], {"loss"}).plot("loss")
    assert axes.get_ylabel() == "held-out loss"
    assert axes.lines[0].get_ydata() == pytest.approx([0.35] * 3)
