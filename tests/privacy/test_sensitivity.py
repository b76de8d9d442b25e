# ruff: noqa: F811  (a fixture)
"""One example more or less, for what each method trains."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from batched_jobs import ROWS, TASK, session  # noqa: F401  (a fixture)
from fedlora.adapter import pack, units
from fedlora.config.sections import Train
from fedlora.messages import ClientInfo, Fit, Round
from fedlora.method import ClientRound
from fedlora.methods.table import TABLE
from fedlora.methods.wrap.head import with_head
from fedlora.randomness import derive
from fedlora.rounds.validator import template_upload
from fedlora.train import private_gradients
from fedlora.train.batched import train_together
from fedlora.train.job import Job
from fedlora.train.record_privacy import RecordPrivacy

CLIP = 0.05
ONE = Train(optimizer="sgd", lr=1.0, max_steps=1)
CLIENT = ClientInfo("x", 2, 1)


def requested(name: str, adapted: Any) -> list[Any]:
    """What a client asks for in the first round, with a head that is trained wherever it can be."""
    row = TABLE[name]
    method = row.make(**row.fixed_settings, rank=4)
    method = with_head(method, "averaged" if row.head == "frozen" else row.head)
    found: list[Any] = []
    rnd, server = Round(0, 0, registered=1, expected_cohort=1), method.init_server(adapted.spec, 0)
    known = ClientRound(
        adapted.spec, CLIENT, rnd, method.send(server, CLIENT, rnd), method.init_client(adapted.spec, CLIENT, 0)
    )
    template_upload(method, known, found)
    return found


def clipped_sum(adapted: Any, examples: Any, request: Fit, rows: Tensor) -> Tensor:
    """Of the factors that are trained, by one step."""
    plain = replace(request, rates=None, penalties=(), correction=None, epochs=None, steps=1, gradient_filter=None)
    job = Job(plain, rows, 3, 0, RecordPrivacy(CLIP, 0.0, 1.0, 1))
    (one,) = train_together(adapted, TASK, examples, [job], ONE, 1000)
    after, unit = pack(one.adapter), units(request.start, adapted.spec.scaling)
    return len(rows) * torch.cat([((x - after[key]) / unit[key]).flatten() for key, x in pack(request.start).items()])


@pytest.fixture
def masks_by_row(monkeypatch):
    """Dropout depends on the row, not its place: masks of neighbors are coupled, as those of fresh seeds can be."""
    monkeypatch.setattr(
        private_gradients, "_seed", lambda job, purpose, step, n: derive(job.seed, purpose, step, int(job.rows[n]))
    )


@pytest.mark.parametrize("name", TABLE)
def test_an_example_changes_what_a_step_releases_by_at_most_the_clip(session, masks_by_row, name):
    """The first, a middle or the last one, with the dropout of the model.

    Masks, frozen factors and all kinds of parts are as the method asks for them.
    """
    adapted, examples = session
    asked = requested(name, adapted)
    if not all(isinstance(one, Fit) for one in asked):
        pytest.skip("not supported by privacy for records: it reads gradients or features")
    norms = []
    for request in asked:
        rows = ROWS[0]
        all_ = clipped_sum(adapted, examples, request, rows)
        for removed in (0, 4, 8):
            one_less = clipped_sum(adapted, examples, request, rows[rows != rows[removed]])
            norms.append(float((all_ - one_less).norm()))
    assert asked and max(norms) <= CLIP * 1.001
    assert max(norms) > CLIP * 0.99  # gradients are larger than the clip
