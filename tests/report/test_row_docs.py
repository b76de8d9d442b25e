"""The page of the round log: current, and complete."""

from pathlib import Path

from fedlora.report.row_docs import entries, page

COMMITTED = Path(__file__).parents[2] / "docs" / "rounds.md"


def test_the_committed_page_is_what_the_code_gives():
    assert COMMITTED.read_text(encoding="utf-8") == page(), "run scripts/pages"


def test_every_key_has_a_meaning_and_only_one_line():
    assert all(one.meaning.endswith(".") for one in entries())
    assert len({one.key for one in entries()}) == len(list(entries()))
