# ruff: noqa: F811  (a fixture)
"""LA-LoRA: turns of the factors in local steps."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from batched_jobs import TASK, jobs, session  # noqa: F401  (a fixture)
from fedlora.adapter import pack, pick
from fedlora.config.sections import Train
from fedlora.messages import ClientInfo, Fit, Round, Trained
from fedlora.methods.averaging import FactorAveraging
from fedlora.methods.la_lora import LALoRA
from fedlora.models.requests import check_request
from fedlora.train import batched
from fedlora.train.batched import train_together
from fedlora.train.job import Job
from fedlora.train.record_privacy import RecordPrivacy

from toy import SPEC

ADAMW = Train(batch_size=3, lr=1e-2, weight_decay=0.1, max_steps=5)
SGD = Train(batch_size=3, lr=1e-2, optimizer="sgd", momentum=0.9, max_steps=5)
PRIVATE = RecordPrivacy(clip=0.5, noise_multiplier=1.0, rate=0.4, steps=100)


def taking_turns(some: list[Job], **more: object) -> list[Job]:
    return [replace(job, request=replace(job.request, alternate=("b", "a"), **more)) for job in some]


def after(session, some: list[Job], settings: Train, steps: int) -> list[dict[str, torch.Tensor]]:
    settings = settings.model_copy(update={"max_steps": steps})
    return [pack(one.adapter) for one in train_together(*_first(session), some, settings, 1000)]


def _first(session):
    return session[0], TASK, session[1]


@pytest.mark.parametrize("privacy", [None, PRIVATE], ids=["plain", "private"])
@pytest.mark.parametrize("settings", [ADAMW, SGD], ids=lambda one: one.optimizer)
def test_a_step_leaves_the_factor_whose_turn_it_is_not_as_it_is_and_trains_the_head(session, settings, privacy):
    some = [replace(job, privacy=privacy) for job in taking_turns(jobs(session[0])[:2])]
    states = [[pack(job.request.start) for job in some], *(after(session, some, settings, n) for n in range(1, 5))]
    for step, (before, now) in enumerate(itertools.pairwise(states)):
        still, moves = ("a", "bw") if step % 2 == 0 else ("b", "aw")
        for old, new in zip(before, now, strict=True):
            assert all(torch.equal(x, pick(new, still)[key]) for key, x in pick(old, still).items())
            assert not any(torch.equal(x, pick(new, moves)[key]) for key, x in pick(old, moves).items())


def test_the_optimizer_counts_the_steps_of_each_factor(session, monkeypatch):
    made, make = [], batched.make_optimizer

    def kept(settings, parameters, rates):
        made.append((parameters, make(settings, parameters, rates)))
        return made[-1][1]

    monkeypatch.setattr(batched, "make_optimizer", kept)
    train_together(*_first(session), taking_turns(jobs(session[0])[:1]), ADAMW, 1000)
    ((parameters, optimizer),) = made
    expected = {"b": 3, "a": 2, "w": 5}
    for key, x in parameters.items():
        assert int(optimizer.state[x]["step"]) == expected[key.rpartition(".")[2]]


def test_a_round_of_one_step_is_that_of_ffa_lora(session):
    start = jobs(session[0], train="ba")[0]
    turns = after(session, taking_turns([start]), SGD, 1)
    frozen = after(session, [replace(start, request=replace(start.request, train=frozenset("b")))], SGD, 1)
    for key, x in frozen[0].items():
        assert torch.equal(turns[0][key], x)


@pytest.mark.parametrize("privacy", [None, PRIVATE], ids=["plain", "private"])
def test_clients_with_unequal_numbers_of_steps_take_the_same_turns_together_as_alone(session, privacy):
    some = taking_turns(jobs(session[0]), gradient_filter="binomial5")
    some = [replace(job, privacy=privacy, request=replace(job.request, steps=1 + i)) for i, job in enumerate(some)]
    together = after(session, some, ADAMW, 5)
    for job, one in zip(some, together, strict=True):
        assert_close(after(session, [job], ADAMW, 5)[0], one, rtol=1e-3, atol=2e-5)


def test_without_filter_turns_and_rate_it_is_fedit():
    client, rnd = ClientInfo("x", 4, 9), Round(0, 0)
    plain, own = FactorAveraging(4), LALoRA(4, filter=False, b_rate=1.0)
    download = plain.init_server(SPEC, 0)
    assert_close(own.init_server(SPEC, 0), download)
    asked = next(own.work(None, download, client, rnd))
    assert isinstance(asked, Fit) and (asked.alternate, asked.gradient_filter) == (("b", "a"), None)
    (expected,) = [next(plain.work({}, download, client, rnd))]
    assert asked.train == expected.train and pack(asked.start).keys() == pack(expected.start).keys()
    smooth = next(LALoRA(4).work(None, download, client, rnd))
    assert smooth.gradient_filter == "binomial5" and smooth.rates == {"b": 2.0}


def test_it_uploads_and_merges_both_factors():
    client, rnd, method = ClientInfo("x", 4, 9), Round(0, 0), LALoRA(4)
    job = method.work(None, method.init_server(SPEC, 0), client, rnd)
    asked = next(job)
    with pytest.raises(StopIteration) as end:
        job.send(Trained(asked.start))
    assert end.value.value[1].values.keys() == pack(asked.start).keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alternate": ("b", "c")}, "alternate"),
        ({"alternate": ("b", "b")}, "alternate"),
        ({"gradient_filter": "gauss"}, "gradient_filter = 'gauss'"),
    ],
)
def test_a_trainer_rejects_turns_and_filters_that_it_does_not_support(session, change, message):
    request = Fit(jobs(session[0])[0].request.start, frozenset("ba"))
    object.__setattr__(request, *next(iter(change.items())))
    with pytest.raises(ValueError, match=message):
        check_request(session[0].spec, request)
