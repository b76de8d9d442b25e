"""What a sweep shows while it runs."""

import io

from rich.console import Console

from fedlora.config.sweep import Sweep
from fedlora.report.sweep_progress import SweepLines, SweepTable
from fedlora.rounds.score_summary import Summary
from fedlora.runs.sweep_plan import Outcome, SweepPlan

from rows import round_row


def plan_of_two_points():
    return SweepPlan(Sweep.load({"axes": {"method.rank": [1, 2]}, "seeds": [0, 1]}))


def console():
    return Console(file=io.StringIO(), width=120)


def test_the_table_has_each_points_runs_round_scores_and_failures():
    plan = plan_of_two_points()
    first, second, third, _ = plan.ready({})
    assert [run.point for run in (first, second, third)] == [0, 1, 0]
    shown = SweepTable(console(), plan, {first.name: Outcome()})
    shown.run_ended(second, Outcome(failed="the reason"))
    shown.round_ended(third, round_row(3, clients={"accuracy": Summary(0.625, 0.5, 0.1, {"a": 0.625})}))
    page = console()
    page.print(shown.table())
    lines = [line.split() for line in page.file.getvalue().splitlines() if line.strip()]
    assert ["method.rank=1", "1/2", "3/5", "held-out", "accuracy", "0.625"] in lines
    assert ["method.rank=2", "1/2", "1"] in lines
    assert lines[-1][:2] == ["2/4", "runs,"] and lines[-1][-1] == "left"
    assert "method.rank=2 seed=0 failed: the reason" in shown._console.file.getvalue()


def test_without_a_terminal_each_run_is_a_line_with_its_last_scores_or_its_failure():
    plan, page = plan_of_two_points(), console()
    first, second, *_ = plan.ready({})
    lines = SweepLines(page, plan, {})
    lines.round_ended(first, round_row(1, train_loss=0.5))
    lines.run_ended(first, Outcome())
    lines.run_ended(second, Outcome(failed="the reason"))
    one, two = page.file.getvalue().splitlines()
    assert one.startswith("1/4 runs, ") and one.endswith("method.rank=1 seed=0: training loss 0.500")
    assert two.endswith("method.rank=2 seed=0: failed: the reason")
