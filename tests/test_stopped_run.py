"""A run that stops early: its adapters, its log, and its resumption."""

import json
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import torch
from safetensors.torch import load_file

from fedlora import Result, UserError, export, resume, run
from fedlora.config.experiment import build
from fedlora.deploy.server import serve
from fedlora.deploy.transport import Transport
from fedlora.rounds.progress import NullProgress
from tiers import fast

from wired import assert_same_runs, furnish, problem


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("home"))


def experiment(home, method="fedit", rounds=9, **evaluate):
    """The labels are random, so that the loss rises from the first round on."""
    table = problem(home, method, rounds=rounds, evaluate={"before": False, **evaluate})
    return build(table, ["clients.held_out=0.3", "train.lr=0.03"])


class Interrupted(NullProgress):
    def round_started(self, rnd, chosen):
        if rnd.index == 2:
            raise KeyboardInterrupt


def assert_same_adapters(one: dict[str, Path], other: dict[str, Path]) -> None:
    assert one.keys() == other.keys() and one
    for name, folder in one.items():
        left, right = (load_file(each / "adapter_model.safetensors") for each in (folder, other[name]))
        assert left.keys() == right.keys() and all(torch.equal(x, right[key]) for key, x in left.items())


@pytest.fixture(scope="module", params=fast(["fedit", "fedsa-lora", "flora"], "fedit", "fedsa-lora"))
def stopped(request, home, tmp_path_factory) -> tuple[str, Result]:
    """One adapter of all clients, one for each of them, and one that is in base updates."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    return request.param, run(experiment(home, request.param, stop_after=2), folder, progress=False)


@pytest.mark.slow
def test_the_adapters_of_a_stopped_run_are_those_of_its_best_round(stopped, home, tmp_path):
    method, result = stopped
    losses = [row.clients["loss"].mean for row in result.rows]
    best = losses.index(min(losses)) + 1
    assert [row.round for row in result.rows] == [1, 2, 3] and best == 1  # else this shows nothing
    assert [row.best_round for row in result.rows] == [1, 1, 1] and result.best_round == 1
    shorter = run(experiment(home, method, rounds=1), tmp_path / "shorter", progress=False)
    assert shorter.best_round is None
    assert_same_adapters(result.adapters, shorter.adapters)
    assert_same_adapters(export(result.folder, "adapter", tmp_path / "exported"), shorter.adapters)
    assert [file.name for file in (result.folder / "best").iterdir()] == ["1.safetensors"]


@pytest.mark.slow
def test_a_run_that_is_interrupted_stops_where_it_would_have(stopped, home, tmp_path):
    method, result = stopped
    other = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(experiment(home, method, stop_after=2), other, Interrupted())
    again = resume(other, progress=False)
    assert_same_runs(result.folder, again.folder)
    assert_same_adapters(result.adapters, again.adapters)


def test_a_stopped_run_trains_no_further_round(stopped):
    _, result = stopped
    again = resume(result.folder, Interrupted(), ["rounds=12"])
    assert again.rows == result.rows
    assert_same_adapters(again.adapters, result.adapters)


@pytest.mark.slow
def test_a_stopped_run_says_so_and_its_card_has_the_scores_of_its_best_round(home, tmp_path):
    messages: list[str] = []

    class Heard(NullProgress):
        def notify(self, message):
            messages.append(message)

    result = run(experiment(home, stop_after=1), tmp_path / "run", Heard())
    assert messages[-1].startswith("stopped after round 2: no improvement of clients.loss.mean")
    assert "the best round is 1" in messages[-1] and "best 1" in repr(result)
    card = (result.adapters[""] / "README.md").read_text()
    assert "after round 1" in card and "after round 2" not in card


@pytest.mark.slow
def test_a_run_without_the_adapter_of_its_best_round_is_damaged(home, tmp_path):
    folder = run(experiment(home, stop_after=1), tmp_path / "run", progress=False).folder
    (folder / "best" / "1.safetensors").unlink()
    with pytest.raises(UserError, match=r"damaged: .*1\.safetensors is missing"):
        resume(folder, progress=False)


@pytest.mark.slow
def test_the_model_before_training_may_be_the_best(home, tmp_path):
    result = run(experiment(home, before=True, stop_after=2), tmp_path / "run", progress=False)
    assert result.best_round == 0 and [row.round for row in result.rows] == [0, 1, 2]
    found = load_file(result.adapters[""] / "adapter_model.safetensors")
    assert not any(x.any() for key, x in found.items() if "lora_B" in key)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluate.metric='global.loss'", "test set"),
        ("evaluate.metric='loss'", "clients.NAME.mean"),
        ("evaluate.metric='clients.loss.spread'", "clients.NAME.mean"),
        ("evaluate.stop_after=0", "of at least 1"),
        ("evaluate.clients='none'", "evaluate.clients = 'all'"),
        ("clients.held_out=0.0", "clients.held_out"),
    ],
)
def test_a_run_that_cannot_stop_early_as_wanted_is_invalid(override, message):
    with pytest.raises(UserError, match=message):
        build({}, ["evaluate.stop_after=2", override])


UNKNOWN = r"^evaluate.metric = 'clients.bleu.mean': .*available: clients.accuracy.mean, clients.loss.mean"


@pytest.mark.parametrize("stop_after", [1, None])
def test_an_unknown_metric_ends_a_run_before_its_model_is_read(stop_after, home, tmp_path):
    settings = experiment(home, metric="clients.bleu.mean", stop_after=stop_after)
    settings = settings.model_copy(update={"model": str(tmp_path / "absent")})
    with pytest.raises(UserError, match=UNKNOWN):
        run(settings, tmp_path / "run", progress=False)


def test_an_unknown_metric_ends_a_deployment_before_its_clients_connect(home, tmp_path):
    (tmp_path / "experiment.toml").write_text(experiment(home, metric="clients.bleu.mean", stop_after=1).to_toml())
    with pytest.raises(UserError, match=UNKNOWN):
        serve(tmp_path, create_autospec(Transport, instance=True))


def test_metrics_of_entities_are_unknown_if_the_tags_are_not_those_of_entities(home, tmp_path):
    rows = [{"tokens": ["bab", "bad"], "tags": ["noun", "verb"]}] * 8
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {"task": "tagging", "data": str(tmp_path / "rows.jsonl"), "clients": {"count": 2, "partition": "iid"}}
    with pytest.raises(UserError, match=r"available: clients.accuracy.mean, clients.loss.mean$"):
        run(build({**problem(home), **given, "evaluate": {"metric": "clients.f1.mean"}}), tmp_path / "run", progress=False)


def test_a_deployment_of_a_personal_method_cannot_stop_early(home, tmp_path):
    (tmp_path / "experiment.toml").write_text(experiment(home, "fedsa-lora", stop_after=1).to_toml())
    with pytest.raises(UserError, match=r"evaluate.stop_after is not supported in a deployment of fedsa-lora"):
        serve(tmp_path, create_autospec(Transport, instance=True))
