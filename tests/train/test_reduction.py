"""The mean of which a step is the gradient: over all targets of a client, or over its examples."""

from dataclasses import dataclass

import pytest
import torch
from torch.testing import assert_close

from batched_jobs import jobs, session  # noqa: F401  (a fixture)
from fedlora.adapter import pack
from fedlora.config.sections import Train
from fedlora.messages import ClientInfo, Gradient
from fedlora.tasks.classification import Classification
from fedlora.train.batched import train_together
from fedlora.train.local import LocalTrainer

WHO, SCHEDULE = ClientInfo("x", 3, 5), {"batch_size": 3, "optimizer": "sgd", "lr": 0.1, "batches": "random"}


@dataclass(frozen=True)
class Repeated(Classification):
    """Classification in which an example counts once, twice or three times, by its label."""

    def losses(self, model, inputs, targets):
        found, _ = super().losses(model, inputs, targets)
        return found * (targets + 1), (targets + 1).to(found)


def gradient(session, task, rows, reduction):  # noqa: F811
    """The gradient of one client's loss."""
    adapted, examples = session
    settings = Train(batch_size=2, reduction=reduction)
    trainer = LocalTrainer(adapted, task, examples, {"x": rows}, {}, examples, settings, eval_batch_size=4)
    start = jobs(adapted)[0].request.start
    return {key: x.double() for key, x in pack(trainer.gradient(WHO, Gradient(start, frozenset("baw")))).items()}


def test_the_gradient_is_that_of_the_mean_over_targets_or_over_examples(session):  # noqa: F811
    rows = jobs(session[0])[0].rows
    counts = session[1].targets[rows] + 1
    assert len(set(counts.tolist())) > 1
    each = [gradient(session, Classification(), row[None], "token") for row in rows]
    weights = {"token": counts / counts.sum(), "example": torch.full((len(rows),), 1 / len(rows))}
    for reduction, own in weights.items():
        found = gradient(session, Repeated(), rows, reduction)
        for key, x in found.items():
            expected = sum(float(w) * one[key] for w, one in zip(own, each, strict=True))
            assert (x - expected).norm() < 1e-4 * expected.norm(), (reduction, key)


@pytest.mark.parametrize("together", [False, True])
def test_training_on_the_mean_over_examples_does_not_see_how_many_targets_each_has(session, together):  # noqa: F811
    adapted, examples = session
    plain, by_example, by_token = (
        [
            one
            for group in ([jobs(adapted)] if together else [[job] for job in jobs(adapted)])
            for one in train_together(adapted, task, examples, group, Train(**SCHEDULE, reduction=reduction), 200)
        ]
        for task, reduction in ((Classification(), "token"), (Repeated(), "example"), (Repeated(), "token"))
    )
    for one, same, other in zip(plain, by_example, by_token, strict=True):
        assert one.loss == pytest.approx(same.loss, rel=1e-5) and one.loss != pytest.approx(other.loss, rel=1e-3)
        assert_close(pack(same.adapter), pack(one.adapter), rtol=1e-3, atol=1e-5)
