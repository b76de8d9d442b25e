"""Sweeps: what is run, what is kept, what fails, and what is resumed."""

import json
import re

import pytest
import tomli_w

import fedlora
from fedlora import UserError, federated_data, sweeping
from fedlora.config.experiment import build
from fedlora.config.sweep import Sweep
from fedlora.runs.cases import find_cases
from fedlora.runs.sweep_folder import cases_of_sweep
from fedlora.runs.sweep_plan import Outcome, SweepPlan
from fedlora.train.local import LocalTrainer

from tiny import LABELS
from wired import assert_same_runs, furnish, problem

HELD_OUT = {"count": 3, "partition": "iid", "held_out": 0.3}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("home"))


def table(home, **more):
    return {"base": {**problem(home), "rounds": 1, "clients": HELD_OUT, **more.pop("base", {})}, **more}


def refused(source, *parts):
    with pytest.raises(UserError) as raised:
        Sweep.load(source)
    assert "\n" not in str(raised.value)
    for part in parts:
        assert part in str(raised.value)


# the file


def test_axes_make_every_combination_and_each_point_of_the_list_is_combined_with_them():
    axes = {"method": {"name": ["fedit", "flora"]}, "clients.alpha": [0.1, 1.0]}
    assert [one.label for one in Sweep.load({"axes": axes}).points] == [
        f"{name} clients.alpha={alpha}" for name in ("fedit", "flora") for alpha in (0.1, 1.0)
    ]
    points = [{"label": "small", "method": {"rank": 2}}, {"method": {"rank": 8}}]
    found = Sweep.load({"points": points, "axes": {"train.lr": [0.1, 0.2]}}).points
    assert [one.label for one in found] == [
        "small, train.lr=0.1",
        "small, train.lr=0.2",
        "method.rank=8 train.lr=0.1",
        "method.rank=8 train.lr=0.2",
    ]
    assert found[3].settings == {"method.rank": 8, "train.lr": 0.2}


def test_an_experiment_of_a_sweep_is_the_base_with_overrides_and_the_points_settings(tmp_path):
    (tmp_path / "e.toml").write_text("rounds = 3\n[method]\nname = 'rolora'\n")
    (tmp_path / "s.toml").write_text(
        "base = 'e.toml'\nseeds = [4]\n[axes]\nlora.rank_pattern = [{ 'layer.0.query' = 4 }]\n"
    )
    sweep = Sweep.load(tmp_path / "s.toml", ["rounds=5"])
    expected = {"rounds": 5, "seed": 4, "method": {"name": "rolora"}, "lora": {"rank_pattern": {"layer.0.query": 4}}}
    assert sweep.experiment(sweep.points[0].settings, 4) == build(expected)


def test_the_text_of_a_sweep_is_the_sweep(tmp_path):
    table = {
        "base": {"wrap": [{"name": "fedprox"}]},
        "axes": {"method": {"name": ["fedit", "flora"]}, "wrap": {"fedprox": {"mu": [0.1, 0.2]}}},
        "points": [{"train": {"lr": 0.1}}, {"lora": {"rank_pattern": {"layer.0.query": 4}}}],
        "search": {"values": {"train": {"batch_size": [4, 8]}}, "mode": "min"},
        "seeds": [3, 1],
    }
    sweep = Sweep.load(table)
    (tmp_path / "s.toml").write_text(sweep.text)
    assert Sweep.load(tmp_path / "s.toml") == sweep


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"axis": {}}, ["'axis'", "'axes'"]),
        ({"axes": {"train": {"lrr": [1]}}}, ["point 'train.lrr=1'", "'train.lrr'", "'lr'"]),
        ({"axes": {"train": {"lr": 0.1}}}, ["axes.train.lr", "list"]),
        ({"axes": {"train": {"lr": []}}}, ["axes.train.lr", "list"]),
        ({"axes": {"train": {"lr": [0.1, -1.0]}}}, ["point 'train.lr=-1.0'", "train.lr = -1.0"]),
        ({"axes": {"seed": [1, 2]}}, ["axes.seed", "`seeds`"]),
        ({"axes": {"train": {"lr": [0.1, 0.1]}}}, ["axes.train.lr", "twice"]),
        ({"points": [{"label": "a"}, {"label": "a"}]}, ["two points", "'a'"]),
        ({"seeds": []}, ["seeds = []"]),
        ({"seeds": [1, 1]}, ["seeds = [1, 1]"]),
        ({"base": {"rounds": 0}}, ["base: rounds = 0"]),
        ({"search": {"values": {"train": {"lr": [0.1]}}, "metric": "global.accuracy"}}, ["global.accuracy", "test set"]),
        ({"search": {"values": {"train": {"lr": [0.1]}}, "metric": "accuracy"}}, ["clients.NAME.mean"]),
        ({"search": {"values": {}}}, ["search.values is empty"]),
        ({"search": {"values": {"train": {"lr": [0.1]}}, "mod": "max"}}, ["'search.mod'", "'mode'"]),
        ({"search": {"values": {"train": {"lr": [0.1, 0.0]}}}}, ["point 'base', train.lr=0.0", "train.lr = 0.0"]),
        (
            {"search": {"values": {"train": {"lr": [0.1]}}}, "base": {"clients": {"held_out": 0.0}}},
            ["clients.held_out = 0", "set clients.held_out = 0.2"],
        ),
        (
            {"search": {"values": {"train": {"lr": [0.1]}}}, "base": {"evaluate": {"clients": "none"}}},
            ["evaluate.clients = 'none'", "set evaluate.clients = 'all'"],
        ),
        ({"search": {"values": {"train.lr": [0.1]}}, "axes": {"train.lr": [0.2]}}, ["train.lr is both"]),
    ],
)
def test_an_invalid_sweep_is_refused_before_anything_is_trained(given, parts):
    refused(given, *parts)


# the order of the runs


def test_seeds_wait_for_the_search_and_the_best_candidate_is_the_run_of_its_seed():
    search = {"values": {"train.lr": [0.1, 0.2, 0.3]}}
    plan = SweepPlan(Sweep.load({"axes": {"method.rank": [1, 2]}, "seeds": [0, 1], "search": search}))
    first, second = plan.candidates
    assert plan.ready({}) == [*first, *second]
    half = Outcome(0.5, "clients.accuracy.mean")
    outcomes = {first[0].name: half, first[1].name: half, first[2].name: Outcome(failed="too large")}
    assert plan.chosen(0, outcomes) == {"train.lr": 0.1}
    runs = plan.runs(0, outcomes)
    assert runs[0] == first[0] and plan.ready(outcomes) == [*second, runs[1]]
    assert plan.count(0) == 4


@pytest.mark.parametrize(
    ("metric", "more", "best"),
    [
        ("clients.accuracy.mean", {}, 0.2),
        ("clients.accuracy.spread", {}, 0.1),
        ("clients.loss.mean", {}, 0.1),
        ("clients.loss.mean", {"mode": "max"}, 0.2),
    ],
)
@pytest.mark.parametrize("named", [True, False])  # else the metric is the one that the runs measured by default
def test_losses_are_minimized_and_other_metrics_maximized_unless_the_search_says_otherwise(metric, more, best, named):
    given = {"metric": metric, **more} if named else more
    plan = SweepPlan(Sweep.load({"search": {"values": {"train.lr": [0.1, 0.2]}, **given}}))
    outcomes = {run.name: Outcome(run.experiment.train.lr, metric) for run in plan.candidates[0]}
    assert plan.chosen(0, outcomes) == {"train.lr": best}


def test_a_point_without_a_successful_candidate_has_no_runs():
    plan = SweepPlan(Sweep.load({"search": {"values": {"train.lr": [0.1, 0.2]}}}))
    for undefined in ("nan", "inf", "-inf"):
        outcomes = {
            plan.candidates[0][0].name: Outcome(float(undefined)),
            plan.candidates[0][1].name: Outcome(failed="why"),
        }
        assert plan.all_failed(0, outcomes) and plan.ready(outcomes) == []


# the runs


def test_a_run_of_a_sweep_equals_the_same_run_alone(home, tmp_path):
    methods = ["fedit", "flora"]  # the second changes the base
    given = table(home, axes={"method.name": methods}, seeds=[0], base={"lora": {"dropout": 0.1}})
    result = fedlora.sweep(given, tmp_path / "sweep")
    assert [one.label for one in result.cases] == methods
    for name, case in zip(methods, result.cases, strict=True):
        for seed, path in case.runs.items():
            settings = [f"method.name={name}", f"seed={seed}"]
            fedlora.run(build(given["base"], settings), tmp_path / f"{name}{seed}")
            assert_same_runs(path, tmp_path / f"{name}{seed}")


@pytest.mark.slow
def test_the_examples_are_read_once_for_each_seed(home, tmp_path, monkeypatch):
    read, seeds = federated_data.load, []

    def counted(data, seed, *more):
        seeds.append(seed)
        return read(data, seed, *more)

    monkeypatch.setattr(federated_data, "load", counted)
    fedlora.sweep(table(home, axes={"method.rank": [33, 34]}, seeds=[0, 1]), tmp_path / "sweep")  # too large to train
    assert seeds == [0, 1]


def test_the_search_keeps_the_best_value_for_all_seeds(home, tmp_path):
    given = table(
        home, seeds=[1, 2], search={"values": {"train.lr": [1e-5, 3e-2]}, "seed": 0, "metric": "clients.loss.mean"}
    )
    (case,) = fedlora.sweep(given, tmp_path / "sweep").cases
    losses = dict((one["train.lr"], loss) for one, loss in case.searched.candidates)
    assert case.searched.chosen == {"train.lr": min(losses, key=losses.get)}
    for seed, path in case.runs.items():
        chosen = fedlora.Experiment.load(path / "experiment.toml")
        assert (chosen.seed, chosen.train.lr) == (seed, case.searched.chosen["train.lr"])


def test_a_failing_point_is_named_and_the_others_are_run_and_resuming_repeats_it_alone(home, tmp_path, monkeypatch):
    given = table(home, axes={"method.rank": [2, 33, 4]})  # 33 is more than the model's width
    result = fedlora.sweep(given, tmp_path / "sweep")
    assert [bool(one.failed) for one in result.cases] == [False, True, False]
    assert find_cases([result.folder]) == result.cases
    assert "method.rank = 33" in result.cases[1].failed[0] and result.cases[1].runs == {}
    before = {path: path.stat().st_mtime_ns for one in result.cases for path in one.runs.values()}
    assert fedlora.sweep(resume=tmp_path / "sweep").cases == result.cases
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.slow
def test_a_programming_error_fails_its_run_alone_with_the_traceback_in_a_file(home, tmp_path, monkeypatch):
    fit = LocalTrainer.fit

    def broken(self, asked, rnd):
        if rnd.seed == 1:
            raise KeyError("secret")
        return fit(self, asked, rnd)

    monkeypatch.setattr(LocalTrainer, "fit", broken)
    (case,) = fedlora.sweep(table(home, seeds=[1, 2]), tmp_path / "sweep").cases
    assert set(case.runs) == {2} and set(case.failed) == {1}
    found = re.fullmatch(r"KeyError; see (.*) in the sweep directory", case.failed[1])
    file = tmp_path / "sweep" / found[1]
    assert "in broken" in file.read_text() and file.stat().st_mode & 0o777 == 0o600
    monkeypatch.undo()
    (case,) = fedlora.sweep(resume=tmp_path / "sweep").cases
    assert set(case.runs) == {1, 2} and not case.failed and not file.exists()


@pytest.mark.slow
def test_two_processes_give_the_runs_of_one(home, tmp_path):
    given = table(home, seeds=[0, 1], axes={"method.rank": [2, 33]})
    one, two = (fedlora.sweep(given, tmp_path / str(n), devices=n) for n in (1, 2))
    assert state(one.folder) == state(two.folder)
    for seed, path in one.cases[0].runs.items():
        assert_same_runs(path, two.cases[0].runs[seed])


@pytest.mark.parametrize("kind", ["classification", "regression", "tagging", "multiple-choice", "causal-lm", "seq2seq"])
def test_a_search_by_a_metric_that_the_task_has_not_is_refused_before_anything_is_trained(kind, tmp_path):
    given = {"base": {"task": kind}, "search": {"values": {"train.lr": [0.1]}, "metric": "clients.loss.mean"}}
    sweeping.read_sweep(given, [])
    given["search"]["metric"] = "clients.acuracy.mean"
    with pytest.raises(UserError, match=r"no such metric; available: .*clients\.loss\.mean"):
        fedlora.sweep(given, tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_whose_runs_would_stop_by_a_metric_that_the_task_has_not_is_refused(tmp_path):
    given = {"points": [{"train.lr": 0.1}, {"evaluate.metric": "clients.acuracy.mean"}]}
    with pytest.raises(UserError, match=r"^evaluate.metric = .* no such metric; available: clients\.accuracy\.mean"):
        fedlora.sweep(given, tmp_path / "sweep")


def test_the_runs_of_a_sweep_are_planned_once(monkeypatch):
    made, experiment = [], Sweep.experiment
    plan = SweepPlan(Sweep.load({"axes": {"method.rank": [2, 4]}, "seeds": [0, 1]}))
    monkeypatch.setattr(Sweep, "experiment", lambda self, *given: made.append(given) or experiment(self, *given))
    assert plan.ready({}) == plan.ready({}) and len(made) == 4


@pytest.mark.parametrize(
    "given",
    [
        {"axes": {"train.clip_norm": [None, 1.0]}},
        {"points": [{"train": {"clip_norm": None}}]},
        {"base": {"train": {"clip_norm": None}}},
        {"search": {"values": {"train.clip_norm": [None, 1.0]}}},
    ],
)
def test_none_in_a_sweep_is_refused(given):
    refused(given, "train.clip_norm: None cannot be stored", "leave the setting out")


@pytest.mark.slow
def test_a_search_without_a_metric_takes_the_tasks_main_one_also_after_resuming(home, tmp_path):
    rows = [json.loads(line) for line in (home / "rows.jsonl").read_text().splitlines()]
    rows = [{"text": row["text"], "label": LABELS.index(row["label"])} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    base = {"data": {"source": str(tmp_path / "rows.jsonl")}, "task": "regression", "evaluate": {"before": False}}
    given = table(home, base=base, search={"values": {"train.lr": [1e-3, 1e-1]}}, seeds=[0, 1])
    with pytest.raises(KeyboardInterrupt):
        fedlora.sweep(given, tmp_path / "sweep", Interrupting(after=2))
    (case,) = fedlora.sweep(resume=tmp_path / "sweep").cases
    assert not case.failed
    assert case.searched.metric == "clients.pearson.mean" and set(case.runs) == {0, 1}
    reached = dict((one["train.lr"], score) for one, score in case.searched.candidates)
    assert case.searched.chosen == {"train.lr": max(reached, key=reached.get)}
    chosen = fedlora.Result.read(case.runs[0]).rows[-1].clients
    assert chosen[next(iter(chosen))].mean == max(reached.values())


@pytest.mark.slow
def test_a_search_whose_clients_have_no_held_out_examples_says_what_to_set(home, tmp_path):
    base = {"data": {**problem(home)["data"], "rows": 3}, "clients": {**HELD_OUT, "min_size": 1}}  # one example each
    given = table(home, base=base, search={"values": {"train.lr": [0.1]}})
    (case,) = fedlora.sweep(given, tmp_path / "sweep").cases
    assert "raise clients.held_out" in case.failed[0]


# the directory


def test_a_sweep_without_enough_devices_leaves_no_directory(home, tmp_path):
    given = table(home, base={"train": {"device": "cuda:1"}})
    with pytest.raises(UserError, match=r"devices = 2: train\.device"):
        fedlora.sweep(given, tmp_path / "sweep", devices=2)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_a_sweep_directory_is_resumed_from_anywhere_without_the_files_of_the_sweep(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    base = {**table(home)["base"], "model": "bert", "data": {"source": "rows.jsonl"}}
    (tmp_path / "e.toml").write_text(tomli_w.dumps(base))
    (tmp_path / "s.toml").write_text(tomli_w.dumps({"base": "e.toml", "seeds": [0, 1]}))
    with pytest.raises(KeyboardInterrupt):
        fedlora.sweep(tmp_path / "s.toml", tmp_path / "sweep", Interrupting(after=1))
    assert len(cases_of_sweep(tmp_path / "sweep")[0].runs) == 1
    for file in ("e.toml", "s.toml"):
        (tmp_path / file).unlink()
    monkeypatch.chdir(tmp_path)
    assert set(fedlora.sweep(resume="sweep").cases[0].runs) == {0, 1}


class Interrupting:
    """Progress that raises KeyboardInterrupt after some runs."""

    def __init__(self, after):
        self.left = after

    def round_ended(self, run, row):
        pass

    def run_ended(self, run, outcome):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_a_used_directory_is_refused_and_so_is_a_changed_sweep(home, tmp_path):
    given, path = table(home, axes={"method.rank": [33]}), tmp_path / "sweep"
    fedlora.sweep(given, path)
    with pytest.raises(UserError, match=re.escape(f"resume it with: fedlora sweep --resume {path}")):
        fedlora.sweep(given, path)
    with pytest.raises(UserError, match="is not empty; choose another"):
        fedlora.sweep({**given, "seeds": [1]}, path)
    with pytest.raises(UserError, match="--resume: expected no sweep file"):
        fedlora.sweep(given, resume=path)
    text = (path / "sweep.toml").read_text()
    (path / "sweep.toml").write_text(text.replace("seeds", "# a comment\nseeds"))
    with pytest.raises(UserError, match="has changed since the sweep began"):
        fedlora.sweep(resume=path)
    with pytest.raises(UserError, match="not a sweep directory"):
        fedlora.sweep(resume=tmp_path)


@pytest.mark.slow
def test_a_sweep_that_runs_is_locked_for_others(home, tmp_path):
    refusals = []

    class Second:
        def round_ended(self, run, row):
            pass

        def run_ended(self, run, outcome):
            with pytest.raises(UserError, match="locked by another process") as raised:
                fedlora.sweep(resume=tmp_path / "sweep")
            refusals.append(raised)

    fedlora.sweep(table(home), tmp_path / "sweep", Second())
    assert len(refusals) == 1


def state(path):
    """The content of sweep.json."""
    return json.loads((path / "sweep.json").read_text())
