"""Statistics, metrics, training and export of a regression."""

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from scipy import stats
from sklearn.metrics import mean_squared_error
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedlora.api import export, resume, run
from fedlora.config.experiment import build
from fedlora.errors import UserError
from fedlora.federated_data import FederatedData
from fedlora.messages import Statistics
from fedlora.report.tables import clients
from fedlora.rounds.loop import RunState
from fedlora.rounds.score_summary import summary
from fedlora.run_exports import write_exports
from fedlora.runs.folder import RunFolder
from fedlora.session import Session
from fedlora.tasks.correlation import pearson, spearman
from fedlora.tasks.regression import Regression
from fedlora.tasks.task import Task

from tiny import WORDS, tiny_bert

TASK: Task = Regression()


class Fixed(nn.Module):
    """A model that predicts these numbers."""

    def __init__(self, predictions: torch.Tensor) -> None:
        super().__init__()
        self.predictions = predictions

    def forward(self) -> SimpleNamespace:
        return SimpleNamespace(logits=self.predictions[:, None])


def measured(predictions, scores, task=TASK):
    """The statistics of one client's examples."""
    sums = task.measure(Fixed(predictions), {}, scores, torch.ones(1, len(scores), dtype=torch.bool))
    return Statistics(len(scores), {name: x[0] for name, x in sums.items()})


def together(predictions, scores, sizes, task=TASK):
    """The sum of the statistics of clients with these numbers of examples."""
    first, *others = (measured(*part, task) for part in zip(predictions.split(sizes), scores.split(sizes), strict=True))
    for other in others:
        first = first + other
    return first


def numbers(seed, rows=500, center=0.0, spread=1.0):
    """Predictions and correlated scores."""
    rng = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, generator=rng)
    predictions = 0.5 * scores + torch.randn(rows, generator=rng)
    return center + spread * predictions, center + spread * scores


SIZES = [1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 1, 1, 60, 7, 100, 90, 10]  # 17 clients, 500 examples


@pytest.mark.parametrize("seed", range(3))
def test_the_metrics_of_all_clients_together_are_those_of_scipy_and_scikit_learn(seed):
    predictions, scores = numbers(seed)
    mse = mean_squared_error(scores, predictions)
    expected = {"pearson": stats.pearsonr(predictions.double(), scores.double()).statistic, "mse": mse, "loss": mse}
    assert TASK.metrics(together(predictions, scores, SIZES)) == pytest.approx(expected, rel=1e-6)


def test_a_center_near_the_scores_keeps_the_correlation_of_scores_that_hardly_differ():
    predictions, scores = numbers(0, center=4096.0, spread=0.01)
    expected = np.corrcoef(predictions.double(), scores.double())[0, 1]
    found = TASK.metrics(together(predictions, scores, SIZES, Regression(center=4096.0)))["pearson"]
    assert found == pytest.approx(expected, rel=1e-9)


def test_sums_without_a_center_give_no_correlation_rather_than_a_wrong_one():
    x, y = (1e4 + 1e-3 * values.double() for values in numbers(1))
    names = ("x", "y", "xx", "yy", "xy")
    raw = dict(zip(names, (x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()), strict=True))
    assert math.isnan(pearson(len(x), raw))
    u, v = x - 1e4, y - 1e4
    shifted = dict(zip(names, (u.sum(), v.sum(), (u * u).sum(), (v * v).sum(), (u * v).sum()), strict=True))
    assert pearson(len(x), shifted) == pytest.approx(stats.pearsonr(u, v).statistic, rel=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.1, 3.3, -1e6])
def test_the_correlation_of_constant_predictions_or_scores_is_undefined(value):
    constant, varied = torch.full((500,), value), numbers(2)[0]
    for pair in ((constant, varied), (varied, constant), (constant, constant)):
        assert math.isnan(TASK.metrics(together(*pair, SIZES))["pearson"])
        assert math.isnan(spearman(*(x.double() for x in pair)))
    assert math.isnan(TASK.metrics(measured(varied[:1], varied[:1]))["pearson"])


def test_rank_correlation_gives_ties_their_mean_rank():
    rng = torch.Generator().manual_seed(0)
    x, y = (torch.randint(6, (50,), generator=rng).double() for _ in range(2))
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, rel=1e-12)


def test_clients_without_a_defined_metric_are_left_out_of_its_statistics_and_counted():
    predictions, scores = numbers(3, 40)
    parts = [(f"c{i}", measured(*part)) for i, part in enumerate(zip(predictions.split(10), scores.split(10), strict=True))]
    constant = ("one", measured(torch.ones(5), scores[:5]))
    with_it, without = (summary(s, TASK.metrics, TASK.lower_is_better) for s in ([*parts, constant], parts))
    assert with_it["pearson"].undefined == 1 and math.isnan(with_it["pearson"].each["one"])
    assert without["pearson"].undefined is None is with_it["mse"].undefined
    for of in ("worst_decile", "spread"):
        assert getattr(with_it["pearson"], of) == getattr(without["pearson"], of)
    alone = summary([constant], TASK.metrics, TASK.lower_is_better)["pearson"]
    assert alone.undefined == 1 and math.isnan(alone.mean) and math.isnan(alone.worst_decile) and math.isnan(alone.spread)


def test_clients_that_share_a_pass_have_their_own_statistics_without_the_filler_rows():
    predictions, scores = numbers(4, 60)
    real = torch.arange(20) < torch.tensor([20, 3, 11])[:, None]
    shared = TASK.measure(Fixed(predictions), {}, scores, real)
    for i, mask in enumerate(real):
        rows = 20 * i + mask.nonzero()[:, 0]
        torch.testing.assert_close(
            {n: x[i] for n, x in shared.items()}, dict(measured(predictions[rows], scores[rows]).sums)
        )


def test_statistics_have_the_names_shapes_and_types_of_those_of_no_examples_and_squares_are_not_negative():
    found, empty = measured(*numbers(5)), TASK.no_statistics([])
    assert {n: (x.shape, x.dtype) for n, x in found.sums.items()} == {n: (x.shape, x.dtype) for n, x in empty.items()}
    assert TASK.check(found) is None
    for name in ("xx", "yy", "loss"):
        assert "negative" in TASK.check(Statistics(500, {**found.sums, name: torch.tensor(-1.0).double()}))


def test_scores_are_divided_into_five_equal_intervals():
    scores = [0.0, 0.99, 1.0, 2.5, 4.999, 5.0, 3.0]
    assert TASK.partition_keys({"label": scores}) == [0, 0, 1, 2, 4, 4, 3]
    assert TASK.partition_keys({"label": [2.0, 2.0]}) == [0, 0]


def rows(path: Path, count=60):
    """Texts whose score depends on their first word."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(2, 9))) for _ in range(count)]
    made = [
        {"text": text, "pair": rng.choice(WORDS), "label": round(5 * WORDS.index(text.split()[0]) / 89, 2)}
        for text in texts
    ]
    path.write_text("\n".join(map(json.dumps, made)))
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model, training rows and test rows."""
    folder = tmp_path_factory.mktemp("home")
    tiny_bert(folder / "model", dropout=0.0)
    rows(folder / "train.jsonl")
    rows(folder / "test.jsonl", 23)
    return folder


def experiment(home, **more):
    """A regression on pairs, with three clients."""
    data = {"source": str(home / "train.jsonl"), "test": str(home / "test.jsonl"), "text_pair": "pair"}
    table = {"task": "regression", "model": str(home / "model"), "data": data, "rounds": 1, "clients": {"count": 3}}
    return build({**table, **more})


def predictions_of(model, tokenizer, path):
    """The scores that a model from disk gives to the pairs in a file, one at a time, and the true ones."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    with torch.inference_mode():
        logits = [model.eval()(**tokenizer(row["text"], row["pair"], return_tensors="pt")).logits for row in found]
    assert all(one.shape == (1, 1) for one in logits)
    return np.array([float(one) for one in logits]), np.array([row["label"] for row in found])


def test_the_exported_adapter_and_the_merged_model_reach_the_logged_metrics(home, tmp_path):
    done = run(experiment(home, method={"name": "fedit", "rank": 4}, train={"lr": 0.01}), tmp_path / "run", False)
    code = (folder := done.adapters[""]).joinpath("README.md").read_text().partition("```python\n")[2].partition("```")[0]
    names = {}
    exec(code.replace("Path()", repr(folder)).replace("PosixPath", "Path"), {"__name__": "card"} | names, names)
    assert not (folder / "labels.json").exists() and " labels" not in folder.joinpath("README.md").read_text()
    export(tmp_path / "run", "merged", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.num_labels == 1 and merged.config.problem_type == "regression"
    for model in (names["model"], merged):
        x, y = predictions_of(model, AutoTokenizer.from_pretrained(folder), home / "test.jsonl")
        expected = {
            "pearson": stats.pearsonr(x, y).statistic,
            "spearman": stats.spearmanr(x, y).statistic,
            "mse": mean_squared_error(y, x),
        }
        assert {name: done.rows[-1].global_[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert repr(done).startswith("Result(fedit, 1 round, test pearson")


def test_one_client_learns_as_a_loop_with_peft(home, tmp_path):
    clients = {"count": 1, "partition": "iid", "held_out": 0.0}
    settings = {"optimizer": "sgd", "lr": 0.05, "batch_size": 60}
    given = experiment(home, clients=clients, train=settings, rounds=4, evaluate={"clients": "none"})
    losses = [row.train_loss for row in run(given, tmp_path / "run", False).rows[1:]]
    session = Session.make(given, FederatedData.make(given))
    start = RunState(session.method.init_server(session.adapted.spec, given.seed))
    folder = RunFolder.create(tmp_path / "start")
    write_exports(session, session.adapters(start, folder, 0), tmp_path / "adapter", "adapter")
    folder.release()
    model = AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "adapter", is_trainable=True, num_labels=1, ignore_mismatched_sizes=True
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    found = [json.loads(line) for line in (home / "train.jsonl").read_text().splitlines()]
    inputs = tokenizer([r["text"] for r in found], [r["pair"] for r in found], padding=True, return_tensors="pt")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    expected = []
    for _ in range(4):
        loss = model(**inputs, labels=torch.tensor([r["label"] for r in found])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(loss.detach()))
    assert losses == pytest.approx(expected, rel=1e-5) and expected[-1] < expected[0]


@pytest.mark.slow
def test_a_resumed_regression_ends_as_an_uninterrupted_one(home, tmp_path):
    whole = run(experiment(home, rounds=2), tmp_path / "whole", False)
    run(experiment(home), tmp_path / "parts", False)
    parts = resume(tmp_path / "parts", False, ["rounds=2"])
    assert parts.rows[-1].global_ == whole.rows[-1].global_ and parts.rows[-1].clients == whole.rows[-1].clients


def test_names_of_labels_are_rejected_for_a_task_without_any(home):
    with pytest.raises(UserError, match=r"data\.labels: the task has no labels"):
        FederatedData.make(experiment(home, data={"source": str(home / "train.jsonl"), "labels": ["a", "b"]}))


def test_the_clients_of_a_regression_are_listed_without_labels(home):
    table = clients(FederatedData.make(experiment(home))).renderables[0]
    assert [column.header for column in table.columns] == ["client", "rank", "train", "held out"]


def test_no_examples_have_no_partition_keys():
    assert TASK.partition_keys({"label": []}) == []
