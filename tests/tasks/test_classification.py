"""Statistics and metrics of classification."""

from types import SimpleNamespace

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, log_loss, matthews_corrcoef
from torch import nn
from torch.nn import functional
from torch.testing import assert_close
from transformers.trainer_pt_utils import LabelSmoother

from fedlora.errors import UserError
from fedlora.messages import Statistics
from fedlora.tasks.classification import Classification
from fedlora.tasks.task import Task

TASK: Task = Classification()
ROWS = 60


class Fixed(nn.Module):
    """A model that answers with these logits."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits)


def logits_and_labels(labels: int, seed: int, present: int | None = None):
    """Logits of as many labels, of which only the first `present` are among labels and predictions."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(ROWS, labels, generator=rng)
    logits[:, present or labels :] -= 100
    return logits, torch.randint(present or labels, (ROWS,), generator=rng)


def measured(logits: torch.Tensor, labels: torch.Tensor) -> Statistics:
    """The statistics of one client's examples, by a model that answers with these logits."""
    sums = TASK.measure(Fixed(logits), {}, labels, torch.ones(1, len(labels), dtype=torch.bool))
    return Statistics(len(labels), {name: x[0] for name, x in sums.items()})


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("labels", "present"), [(2, 2), (3, 3), (7, 4), (30, 30)])
def test_the_metrics_are_those_of_scikit_learn(labels, present, seed):
    logits, wanted = logits_and_labels(labels, seed, present)
    guessed = logits.argmax(1)
    assert TASK.metrics(measured(logits, wanted)) == pytest.approx(
        {
            "accuracy": accuracy_score(wanted, guessed),
            "loss": log_loss(wanted, logits.double().softmax(1), labels=range(labels)),
            "f1": f1_score(wanted, guessed, average="macro"),
            "mcc": matthews_corrcoef(wanted, guessed),
        },
        rel=1e-6,
    )


def test_one_prediction_for_all_has_no_correlation_with_the_labels():
    logits = torch.tensor([[1.0, 0.0]]).repeat(4, 1)
    found = TASK.metrics(measured(logits, torch.tensor([0, 0, 0, 1])))
    assert found["mcc"] == 0 == matthews_corrcoef([0, 0, 0, 1], [0, 0, 0, 0]) and found["accuracy"] == 0.75


@pytest.mark.parametrize("sizes", [[1] * ROWS, [17, 1, 30, 12], [59, 1]])
def test_the_statistics_of_any_division_of_the_examples_add_up(sizes):
    logits, labels = logits_and_labels(5, 0)
    parts = [measured(*part) for part in zip(logits.split(sizes), labels.split(sizes), strict=True)]
    total, whole = parts[0], measured(logits, labels)
    for part in parts[1:]:
        total = total + part
    assert total.examples == whole.examples
    assert torch.equal(total.sums["confusion"], whole.sums["confusion"])
    assert TASK.metrics(total) == pytest.approx(TASK.metrics(whole), rel=1e-12)


def test_clients_that_share_a_pass_have_their_own_statistics_without_the_filler_rows():
    logits, labels = logits_and_labels(4, 1)
    real = torch.arange(20) < torch.tensor([20, 3, 11])[:, None]
    together = TASK.measure(Fixed(logits), {}, labels, real)
    for i, mask in enumerate(real):
        rows = 20 * i + mask.nonzero()[:, 0]
        assert_close({name: x[i] for name, x in together.items()}, dict(measured(logits[rows], labels[rows]).sums))


def test_statistics_have_the_names_shapes_and_types_of_those_of_no_examples():
    found, empty = measured(*logits_and_labels(4, 2)).sums, TASK.no_statistics(list("abcd"))
    assert {name: (x.shape, x.dtype) for name, x in found.items()} == {n: (x.shape, x.dtype) for n, x in empty.items()}
    assert not any(x.any() for x in empty.values())


def test_statistics_of_other_numbers_of_examples_or_negative_losses_are_rejected():
    honest = measured(*logits_and_labels(4, 2))
    assert TASK.check(honest) is None
    assert "of 60 examples, not 61" in TASK.check(Statistics(61, honest.sums))
    assert "negative" in TASK.check(Statistics(60, {**honest.sums, "loss": -honest.sums["loss"]}))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, [0.5, 3.0, 1.0]])
def test_the_mean_training_loss_is_that_of_torch_and_of_transformers_trainer(smoothing, weights):
    logits, labels = logits_and_labels(3, seed=0)
    sums, counts = Classification(smoothing, weights).losses(Fixed(logits), {}, labels)
    mean = sums.sum() / counts.sum()
    tensor = None if weights is None else torch.tensor(weights)
    assert_close(mean, functional.cross_entropy(logits, labels, tensor, label_smoothing=smoothing))
    if weights is None:
        assert_close(mean, LabelSmoother(smoothing)({"logits": logits}, labels))


def test_evaluations_have_the_plain_cross_entropy():
    logits, labels = logits_and_labels(3, seed=0)
    real = torch.ones(1, ROWS, dtype=torch.bool)
    plain, other = (task.measure(Fixed(logits), {}, labels, real) for task in (TASK, Classification(0.2, [0.5, 3.0, 1.0])))
    assert_close(plain, other, rtol=0, atol=0)


def test_class_weights_are_one_for_each_label():
    with pytest.raises(UserError, match=r"task.class_weights has 2 entries for 3 labels.*: x, y, z"):
        Classification(class_weights=[1.0, 2.0]).outline("unused", ["x", "y", "z"])
