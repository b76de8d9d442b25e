"""The methods' pages, and what they tell of results that others have published."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from fedlora import Experiment
from fedlora.errors import UserError
from fedlora.methods.table import TABLE
from fedlora.report import method_docs
from fedlora.report.published_results import read, reported

COMMITTED = Path(__file__).parents[2] / "docs" / "methods"

STUDY = """
[others]
central = "all data in one place"
[[study]]
about = ["fedit"]
source = "nobody 2026, arXiv:2601.00001"
read = "paper"
model = "MiniLM"
metric = "accuracy, %"
benchmarks = ["one", "two"]
[study.values]
fedit = [1.50, nan]
central = [2, 3]
[[claim]]
about = ["fedit"]
claim = "It is good."
source = "nobody 2026"
read = "abstract"
"""


def test_the_committed_pages_are_what_the_table_gives():
    committed = {file.name: file.read_text(encoding="utf-8") for file in COMMITTED.glob("*.md")}
    assert committed == method_docs.texts(), "run scripts/pages"


def test_a_page_tells_all_that_its_row_says():
    for row in TABLE.values():
        page = method_docs.page(row)
        assert all(
            part in page
            for part in (row.exact, row.secure_sums(), row.noise, *row.up, *row.down, *row.known_failures.values())
        )
        assert all(f"`{key} = " in page for key in row.settings())


@pytest.mark.parametrize("name", TABLE)
def test_a_page_and_the_index_name_the_initial_factors_that_an_experiment_accepts(name):
    def accepted(init):
        try:
            return bool(Experiment(method={"name": name}, lora={"init": init}))
        except UserError:
            return False

    page, index = method_docs.page(TABLE[name]), method_docs.index()
    (listed,) = re.findall(r"^\| initial factors .*\| (.*) \|$", page, re.MULTILINE)
    (line,) = re.findall(rf"^\| \[{name}\].*$", index, re.MULTILINE)
    named = set(re.findall("`(.*?)`", listed)) or {"uniform"}  # a method's own factors replace the default
    assert named == {init for init in ("uniform", "gaussian", "pissa") if accepted(init)}
    assert line.split(" | ")[4] == ("yes" if "pissa" in named else "no")


def test_pages_of_methods_that_are_gone_are_removed(tmp_path):
    (tmp_path / "gone.md").touch()
    method_docs.write(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"README.md", *(f"{name}.md" for name in TABLE)}


def test_figures_keep_the_digits_of_their_source():
    study = read(STUDY).study[0]
    assert [str(value) for value in study.values["fedit"]] == ["1.50", "NaN"]


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("fedit = [1.50, nan]", "fedit = [1.50]", "fedit has 1 values for 2 benchmarks"),
        ("fedit = [1.50, nan]", "fedit = [nan, nan]", "fedit has no value"),
        ("central = [2, 3]", "elsewhere = [2, 3]", "elsewhere"),
        ('about = ["fedit"]', 'about = ["fedid"]', "fedid"),
        ('read = "paper"', 'read = "memory"', "memory"),
        ('read = "paper"', "", "read"),
    ],
)
def test_a_report_that_is_incomplete_or_unknown_is_refused(old, new, part):
    with pytest.raises(ValidationError, match=part):
        read(STUDY.replace(old, new, 1))


def test_every_study_is_about_one_of_the_methods_it_has_values_for():
    assert all(set(study.about) <= set(study.values) for study in reported().study)
