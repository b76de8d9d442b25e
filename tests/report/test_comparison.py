"""Comparison of runs: cases, figures, differences, and what is said about them."""

import json
import math
import statistics
from dataclasses import replace

import pytest
from scipy import stats

from fedlora import UserError, compare
from fedlora.config.sweep import Sweep
from fedlora.report.comparability import edge_of_search, unfinished
from fedlora.report.intervals import over_seeds_and_clients
from fedlora.runs.case import Case, Searched
from fedlora.runs.manifest_file import encode_manifest
from fedlora.runs.sweep_folder import SweepFolder
from fedlora.runs.sweep_plan import Outcome

from saved import scored, write_run

CLIENTS = ("c0", "c1", "c2", "c3")
FEDIT = {0: 0.50, 1: 0.55, 2: 0.52}
FLORA = {0: 0.56, 1: 0.63, 2: 0.59}


def each(accuracy, seed):
    """Accuracies of the clients, whose mean is `accuracy`."""
    return {client: accuracy + (i - 1.5) * 0.01 * (1 + seed) for i, client in enumerate(CLIENTS)}


def written(tmp_path, name, method, seed, accuracy, *overrides, rounds=2, held_out=None, **given):
    rows = [scored(i + 1, accuracy * (i + 1) / rounds, each(accuracy, seed), held_out=held_out) for i in range(rounds)]
    return write_run(tmp_path / name, rows, f"method.name={method}", f"seed={seed}", *overrides, **given)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of two methods with three seeds each."""
    place = tmp_path_factory.mktemp("runs")
    return [
        written(place, f"{method}{seed}", method, seed, value)
        for method, values in (("fedit", FEDIT), ("flora", FLORA))
        for seed, value in values.items()
    ]


def test_runs_that_differ_only_in_their_seed_are_one_case_and_labels_are_what_differs(runs):
    found = compare(runs)
    assert [case.label for case in found.cases] == ["fedit", "flora"]
    assert [list(case.runs) for case in found.cases] == [[0, 1, 2]] * 2
    assert compare(runs[:3]).cases[0].label == "fedit"


def test_a_setting_that_only_one_method_has_is_named_if_its_runs_differ_in_it(tmp_path):
    paths = [
        written(tmp_path, "0", "fedit", 0, 0.5),
        *(written(tmp_path, str(w), "ditto", 0, 0.5, f"method.prox_weight={w}") for w in (0.25, 0.5)),
    ]
    assert [case.label for case in compare(paths).cases] == [
        "fedit",
        "ditto method.prox_weight=0.25",
        "ditto method.prox_weight=0.5",
    ]


def test_seeds_that_ran_on_different_devices_are_one_case(tmp_path):
    paths = [written(tmp_path, str(seed), "fedit", seed, 0.5, f"train.device=cuda:{seed}") for seed in (0, 1)]
    assert len(compare(paths).cases) == 1


def test_figures_are_the_mean_and_standard_deviation_over_seeds_of_the_last_round_and_the_costs_of_all(runs):
    case = compare(runs).cases[0]
    found = {name: (figure.mean, figure.std) for name, figure in case.figures.items()}
    values, spreads = list(FEDIT.values()), [statistics.pvariance(each(x, seed).values()) for seed, x in FEDIT.items()]
    deciles = [min(each(x, seed).values()) for seed, x in FEDIT.items()]
    for name, expected in (
        ("global.accuracy", values),
        ("global.loss", [1 - x for x in values]),
        ("clients.accuracy.mean", values),
        ("clients.accuracy.worst_decile", deciles),
        ("clients.accuracy.variance", spreads),
        ("aggregation_error", [0.25] * 3),
        ("bytes_up", [800] * 3),
        ("bytes_down", [1600] * 3),
        ("seconds", [4.0] * 3),
    ):
        assert found[name] == pytest.approx((statistics.mean(expected), statistics.stdev(expected))), name


def test_the_difference_of_a_test_metric_is_scipys_paired_t_test(runs):
    difference = compare(runs).cases[1].figures["global.accuracy"].difference
    expected = stats.ttest_rel(list(FLORA.values()), list(FEDIT.values())).confidence_interval()
    assert difference.mean == pytest.approx(statistics.mean(FLORA.values()) - statistics.mean(FEDIT.values()))
    assert (difference.interval.low, difference.interval.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("known", [True, False])  # rows of earlier releases have no numbers of held-out examples
def test_the_difference_of_a_held_out_metric_is_paired_by_client_and_weighted_by_its_held_out_examples(known, tmp_path):
    training = (10, 20, 30, 40)
    sizes = (7, 1, 3, 2) if known else training
    held_out = dict(zip(CLIENTS, sizes, strict=True)) if known else None
    paths = [
        written(tmp_path, f"{method}{seed}", method, seed, values[seed], examples=training, held_out=held_out)
        for method, values in (("fedit", FEDIT), ("flora", FLORA))
        for seed in (0, 2)
    ]
    difference = compare(paths).cases[1].figures["clients.accuracy.mean"].difference
    pairs = []
    for seed in (0, 2):
        own, base = each(FLORA[seed], seed), each(FEDIT[seed], seed)
        pairs.append({name: (own[name] - base[name], float(n)) for name, n in zip(CLIENTS, sizes, strict=True)})
    differences = [FLORA[seed] - FEDIT[seed] for seed in (0, 2)]
    assert difference.interval == over_seeds_and_clients(differences, pairs, False)


def test_a_baseline_is_chosen_by_its_label_and_has_no_difference_to_itself(runs):
    one, other = compare(runs).cases, compare(runs, baseline="flora").cases
    assert one[0].figures["global.loss"].difference is None and other[1].figures["global.loss"].difference is None
    there, back = (case.figures["global.loss"].difference for case in (one[1], other[0]))
    assert there.mean == pytest.approx(-back.mean)
    assert (there.interval.low, there.interval.high) == pytest.approx((-back.interval.high, -back.interval.low))


def test_differences_are_over_the_seeds_of_both_and_unequal_seeds_are_said(runs):
    found = compare([*runs[:3], *runs[4:]])
    assert found.cases[1].figures["global.accuracy"].difference.mean == pytest.approx(
        statistics.mean(FLORA[seed] - FEDIT[seed] for seed in (1, 2))
    )
    assert any("flora: seeds 1, 2, the baseline has 0, 1, 2; differences are over 1, 2" in note for note in found.notes)


def test_one_seed_has_no_interval_for_test_metrics_and_the_note_says_why(runs):
    found = compare([runs[0], runs[3]])
    figures = found.cases[1].figures
    assert figures["global.accuracy"].difference.interval is None and figures["global.accuracy"].std is None
    assert any("needs at least two" in note for note in found.notes)


def test_other_examples_leave_the_difference_out_and_another_partition_keeps_it(runs, tmp_path):
    other = written(tmp_path, "other", "ffa-lora", 0, 0.6, train="other")
    moved = written(tmp_path, "moved", "rolora", 0, 0.6, partition="moved")
    found = compare([runs[0], other, moved])
    without, kept = (case.figures["global.accuracy"].difference for case in found.cases[1:])
    assert without is None and kept.mean == pytest.approx(0.1)
    assert any("ffa-lora" in note and "other task or examples" in note for note in found.notes)
    assert any("rolora" in note and "another partition" in note for note in found.notes)
    assert compare([runs[0], runs[3]]).notes == found.notes[-1:], "equal data are not mentioned"


@pytest.mark.parametrize(
    ("overrides", "rounds", "part"),
    [
        (("train.max_length=32",), 2, "train.max_length 32 (the baseline 128)"),
        ((), 3, "rounds 3 (the baseline 2), local steps 36 (the baseline 24)"),
    ],
)
def test_another_budget_is_said(overrides, rounds, part, runs, tmp_path):
    more = written(tmp_path, "more", "fedit", 0, 0.6, *overrides, rounds=rounds)
    (note,) = [note for note in compare([runs[0], more]).notes if "budget" in note]
    assert part in note


def test_of_private_runs_no_steps_and_numbers_of_examples_are_compared(tmp_path):
    private = ("privacy.unit=record", "privacy.epsilon=8.0", "privacy.delta=1e-5", "evaluate.clients=none")
    paths = [written(tmp_path, f"{rounds}", "fedit", 0, 0.6, *private, rounds=rounds) for rounds in (2, 3)]
    (note,) = [note for note in compare(paths).notes if "budget" in note]
    assert "rounds 3 (the baseline 2)" in note and "steps" not in note and "examples" not in note


def test_an_unfinished_run_is_left_out_and_said(runs, tmp_path):
    part = written(tmp_path, "part", "flora", 3, 0.9, "rounds=2", rounds=1)
    found = compare([*runs, part])
    assert [list(case.runs) for case in found.cases] == [[0, 1, 2], [0, 1, 2]]
    assert "flora, seed 3: unfinished, 1 of 2 rounds; left out" in found.notes
    with pytest.raises(UserError, match="no run is finished; flora, seed 3: unfinished, 1 of 2"):
        compare(part)


def test_rows_of_another_version_are_rejected_with_their_file(tmp_path):
    path = write_run(tmp_path / "old", [replace(scored(1, 0.5, each(0.5, 0)), version=0)])
    with pytest.raises(UserError, match=r"old/rounds\.jsonl: line 1: expected version"):
        compare(path)


def test_the_same_run_twice_is_rejected(runs):
    with pytest.raises(UserError, match="has the same settings and seed as"):
        compare([runs[0], runs[0]])


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"metrics": ["acuracy"]}, "no run has the metric 'acuracy'; did you mean 'accuracy'"),
        ({"metrics": ["x"]}, "allowed: accuracy, loss"),
        ({"baseline": "flor"}, "did you mean 'flora'"),
    ],
)
def test_an_unknown_metric_or_baseline_is_rejected_with_the_allowed_ones(given, part, runs):
    with pytest.raises(UserError) as raised:
        compare(runs, **given)
    assert part in str(raised.value)


def test_a_personal_method_has_held_out_figures_only(runs, tmp_path):
    rows = [scored(i, 0.5, each(0.5, 0), global_=None, aggregation_error=None) for i in (1, 2)]
    personal = write_run(tmp_path / "personal", rows, "method.name=ditto")
    own = compare([runs[0], personal]).cases[1].figures
    assert own["clients.accuracy.mean"].difference is not None
    assert not {"global.accuracy", "aggregation_error"} & own.keys()


def test_a_score_that_is_not_a_number_stays_one_in_the_mean(runs, tmp_path):
    lost = {"accuracy": 0.1, "loss": math.nan, "examples": 9}
    broken = write_run(tmp_path / "broken", [scored(i, 0.1, each(0.1, 3), global_=lost) for i in (1, 2)], "seed=3")
    found = compare([*runs[3:], *runs[:3], broken])
    assert math.isnan(found.cases[1].figures["global.loss"].mean)
    assert math.isnan(json.loads(found.to_json())["cases"][1]["global.accuracy"]) is False
    assert json.loads(found.to_json())["cases"][1]["global.loss"] is None


def test_runs_without_an_evaluation_have_costs_and_nothing_to_plot(tmp_path):
    found = compare(write_run(tmp_path / "run", [scored(1, 0.5, each(0.5, 0), global_=None, clients=None)]))
    assert [table.title for table in found.tables()] == ["costs"]
    with pytest.raises(UserError, match="no run was evaluated"):
        found.plot()


@pytest.mark.parametrize(
    ("tried", "chosen", "words"),
    [
        ((0.1, 0.2, 0.3), 0.2, []),
        ((0.1, 0.2, 0.3), 0.3, ["largest"]),
        ((0.1, 0.2, 0.3), 0.1, ["smallest"]),
        ((0.1,), 0.1, []),
        (("adamw", "sgd"), "sgd", []),
    ],
)
def test_a_chosen_value_at_the_edge_of_the_searched_ones_is_said(tried, chosen, words):
    candidates = [({"train.lr": value}, 0.5) for value in tried]
    case = Case("a", {}, Searched("clients.accuracy.mean", candidates, {"train.lr": chosen}))
    notes = list(edge_of_search(case))
    assert [word for note in notes for word in ("smallest", "largest") if word in note] == words


def test_a_failed_run_is_named_with_its_reason():
    assert list(unfinished(Case("a", {}, failed={2: "out of memory"}), {})) == ["a, seed 2: no finished run: out of memory"]


def test_a_metric_that_only_the_test_set_has_is_compared_there(tmp_path):
    paths = [
        write_run(
            tmp_path / str(rank),
            [scored(1, 0.5, each(0.5, 0), global_={"accuracy": 0.5, "loss": 0.5, "spearman": rank / 10, "examples": 9})],
            f"method.rank={rank}",
        )
        for rank in (2, 4)
    ]
    found = compare(paths, metrics=["spearman"]).cases[1].figures
    assert found["global.spearman"].difference.mean == pytest.approx(0.2)
    assert "clients.spearman.mean" not in found


def test_a_run_with_settings_of_another_version_is_rejected_with_its_directory(tmp_path):
    path = write_run(tmp_path / "run", [scored(1, 0.5, each(0.5, 0))])
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["experiment"]["tomorrow"] = 1
    manifest.pop("sha256")
    (path / "manifest.json").write_text(encode_manifest(manifest))
    with pytest.raises(UserError, match="run: the run's settings are not supported by this version"):
        compare(path)


def test_a_run_that_stopped_early_is_finished_and_has_the_scores_of_its_best_round(tmp_path):
    rows = [scored(n, x, each(x, 0), best_round=min(n, 2)) for n, x in ((1, 0.5), (2, 0.8), (3, 0.6))]
    stopping = ("rounds=9", "evaluate.stop_after=1", "evaluate.metric=clients.accuracy.mean")
    comparison = compare(write_run(tmp_path / "run", rows, *stopping))
    figures = comparison.cases[0].figures
    assert not comparison.notes
    assert (figures["global.accuracy"].mean, figures["bytes_up"].mean) == (0.8, sum(row.bytes_up for row in rows))
    assert figures["clients.accuracy.mean"].mean == rows[1].clients["accuracy"].mean


def swept(path, values, methods=("fedit", "flora"), done=None):
    """A sweep with these accuracies by seed, of which only the runs of the seeds `done` have ended."""
    sweep = Sweep.load({"base": {"rounds": 1}, "axes": {"method.name": list(methods)}, "seeds": list(values)})
    folder, outcomes = SweepFolder.create(path, sweep), {}
    for point, method in enumerate(methods):
        for seed, planned in folder.plan.runs(point, {}).items():
            if done is None or seed in done:
                given = (f"method.name={method}", f"seed={seed}")
                write_run(folder.run(planned.name), [scored(1, values[seed], each(values[seed], seed))], *given)
                outcomes[planned.name] = Outcome()
    folder.save(outcomes)
    folder.release()
    return path


def test_equal_labels_of_two_sweeps_and_of_runs_have_the_names_of_their_directories(tmp_path, runs):
    paths = [swept(tmp_path / name, values) for name, values in (("a", FEDIT), ("b", FLORA), ("c/a", FEDIT))]
    assert [case.label for case in compare(paths[0]).cases] == ["fedit", "flora"]
    found = compare([*paths[:2], *runs[:3]])
    assert [case.label for case in found.cases] == ["a fedit", "a flora", "b fedit", "b flora", "fedit0 fedit"]
    lines = [[cell.text for cell in row] for row in found.tables()[0].rows]
    assert [row[0] for row in lines if "baseline" in row] == ["a fedit"]
    assert len({case.label for case in compare([paths[0], paths[2]]).cases}) == 4
    with pytest.raises(UserError, match="given twice"):
        compare([paths[0], paths[0]])


def test_seeds_of_a_sweep_that_have_not_run_are_said(tmp_path):
    found = compare(swept(tmp_path / "sweep", FEDIT, done=(0, 1)))
    assert [list(case.runs) for case in found.cases] == [[0, 1]] * 2
    assert [note for note in found.notes if "not run yet" in note] == [
        f"{method}, seed 2: no finished run: not run yet" for method in ("fedit", "flora")
    ]


@pytest.mark.parametrize(
    ("overrides", "compared"),
    [
        (("task.label_smoothing=0.1",), True),
        (("task.class_weights=[1.0, 2.0]",), True),
        (("task.kind=regression",), False),
    ],
)
def test_training_options_of_the_task_keep_the_difference_and_another_task_leaves_it_out(overrides, compared, tmp_path):
    paths = [written(tmp_path, str(i), "fedit", 0, 0.5, *given) for i, given in enumerate(((), overrides))]
    assert (compare(paths).cases[1].figures["global.accuracy"].difference is not None) == compared


@pytest.mark.parametrize(
    ("given", "overrides", "part"),
    [
        ({"model": "other"}, (), "other model of seeds 1"),
        ({"examples": (10, 10, 10)}, (), None),
        ({"train": "other"}, (), None),  # the examples of another seed
        ({"test": "other"}, (), None),
        ({"test": "other"}, ("data.test=test.csv",), "other test examples of seeds 1"),
        ({"test": "other"}, ("data.test=test.csv", "data.test_rows=5"), None),
    ],
)
def test_seeds_of_a_case_with_other_models_or_data_are_said(given, overrides, part, tmp_path):
    paths = [written(tmp_path, str(seed), "fedit", seed, 0.5, *overrides, **more) for seed, more in ((0, {}), (1, given))]
    notes = [note for note in compare(paths).notes if "with the same settings" in note]
    assert [part in note for note in notes] == ([] if part is None else [True])
