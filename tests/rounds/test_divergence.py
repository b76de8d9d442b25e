"""Merges that fail or give what is not finite, models that have diverged: the run keeps its state and names an upload."""

import io
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from rich.console import Console
from test_validator import MEMBERS, METHOD, SPEC, Answers, NoFolds, Watched, equal, only, run_rounds, upload

from fedlora.adapter import Adapter
from fedlora.config.sections import Evaluate, Sampling
from fedlora.errors import RunStopped
from fedlora.messages import ClientInfo, Mean, Merged, Reply, Round
from fedlora.methods.averaging import FactorAveraging
from fedlora.methods.wrap.head import HeadRule
from fedlora.report.terminal import Live
from fedlora.rounds.codec import decode_state, encode_state
from fedlora.rounds.finite import Largest, divergence, is_finite
from fedlora.rounds.loop import one_round
from fedlora.rounds.loop import run_rounds as rounds
from fedlora.rounds.plan import Plan, RunState
from fedlora.rounds.validator import Failed

from rows import round_row
from toy import MemoryStates, Recorder, ToyTrainer, toy_clients, toy_metrics, toy_plan, toy_simulation


@dataclass(frozen=True)
class Fragile(HeadRule):
    """FedIT, which collects one by one and cannot stand an entry above 100: it raises the error, or merges to infinity."""

    error: type[Exception] | None = torch.linalg.LinAlgError

    @property
    def collects_mean(self) -> bool:
        return False

    def collect(self, server: Any, collected: tuple[Mean, bool] | None, reply: Reply) -> tuple[Mean, bool]:
        large = max(float(x.abs().max()) for x in reply.upload.values.values()) > 100
        if self.error is not None and large:
            raise self.error("did not converge")
        mean, already = collected or (Mean(), False)
        mean.add(reply.weight, reply.upload.values, reply.client.id)
        return mean, already or large

    def merge(self, server: Any, collected: tuple[Mean, bool], rnd: Round) -> Merged[Any]:
        mean, large = collected
        merged = super().merge(server, mean, rnd)
        return (
            replace(merged, server=replace(merged.server, head={"out.w": torch.full((2, 4), math.inf)}))
            if large
            else merged
        )


def fragile(error: type[Exception] | None = torch.linalg.LinAlgError) -> Fragile:
    return Fragile(FactorAveraging(rank=4), "averaged", error)


def huge(reply: Reply) -> Reply:
    return upload(**{"v.a": lambda x: x + 1000.0})(reply)


@pytest.mark.parametrize("error", [torch.linalg.LinAlgError, OverflowError, ZeroDivisionError, None])
def test_a_merge_that_fails_is_discarded_and_repeated_without_the_upload_that_changed_most(error):
    watch = Watched()
    after, row = run_rounds(Answers(MEMBERS[:4], only("b", huge)), watch, method=fragile(error))
    without, _ = run_rounds(Answers([MEMBERS[0], *MEMBERS[2:4]], lambda r: [replace(r, round=Round(4, 0))]))
    assert row.attempts == 2 and row.chosen == row.accepted == ["a", "c", "d"]
    reason = row.rejected.pop("b")
    assert "has the largest change: norm 3464" in reason and (error.__name__.lstrip("_") if error else "infinite") in reason
    assert row.rejected == {} and ("b", reason) in watch.answers
    assert is_finite(after) and not equal(after, without)  # the clients' second attempt is not their first


def test_a_merge_that_fails_at_the_first_reply_still_lets_the_whole_cohort_answer():
    watch = Watched()
    run_rounds(Answers(MEMBERS[:4], only("a", huge)), watch, method=fragile())
    assert [client for client, rejected in watch.answers if rejected is None] == ["a", "b", "c", "d", "b", "c", "d"]


def test_another_error_of_a_merge_is_no_ones_upload():
    with pytest.raises(KeyError):
        run_rounds(Answers(MEMBERS[:4], only("b", huge)), method=fragile(KeyError))


def test_after_the_last_attempt_the_run_stops_with_the_state_as_it_was():
    server = METHOD.init_server(SPEC, 0)
    before = encode_state(server)
    with pytest.raises(RunStopped, match=r"no attempt \(2 made\).*: merging ended in LinAlgError.*; .: merging ended in"):
        run_rounds(Answers(MEMBERS[:4], lambda r: [huge(r)]), method=fragile(), before=server, attempts=2)
    assert encode_state(server) == before


def test_a_client_that_is_the_only_one_is_asked_again():
    watch = Watched()
    with pytest.raises(RunStopped, match="a: merging ended in"):
        run_rounds(Answers(MEMBERS[:1], lambda r: [huge(r)]), watch, method=fragile())
    assert [len(cohort) for cohort in watch.cohorts] == [1, 1, 1]


def test_every_row_names_the_largest_upload_of_its_round():
    _, row = run_rounds(Answers(MEMBERS[:4], only("c", huge)))
    assert row.largest_upload.client == "c" and row.largest_upload.norm == pytest.approx(1000 * 12**0.5, rel=1e-3)


def test_what_is_known_of_the_largest_upload_survives_a_resume(tmp_path):
    progress, _ = one_round(
        Plan(METHOD, SPEC, 0, Sampling(), Evaluate(clients="none"), 9, metrics=toy_metrics),
        Answers(MEMBERS[:4], only("c", huge)),
        NoFolds(),
        RunState(METHOD.init_server(SPEC, 0)),
        4,
        Watched(),
    )
    assert progress.largest is not None and (progress.largest.client, progress.largest.round) == ("c", 5)
    (tmp_path / "state").write_bytes(encode_state(progress))
    assert decode_state(str(tmp_path / "state"))[0].largest == progress.largest


LAST = Largest("c", 3464.1, 4)


@pytest.mark.parametrize(("diverged", "named"), [(1, False), (2, True), (4, True)])
def test_where_half_of_the_cohort_is_not_finite_the_last_rounds_largest_upload_is_named(diverged, named):
    bad = {client.id for client in MEMBERS[:diverged]}
    nan = upload(**{"v.a": lambda x: x * math.nan})
    answers = Answers(MEMBERS[:4], lambda r: [nan(r)] if r.client.id in bad else [r])
    plan = Plan(METHOD, SPEC, 0, Sampling(attempts=1), Evaluate(clients="none"), 9, metrics=toy_metrics)
    if diverged == 4:
        with pytest.raises(
            RunStopped, match=r"4 of 4 clients had NaN.*upload of round 4, of client c, has a change of norm 3464"
        ):
            one_round(plan, answers, NoFolds(), RunState(METHOD.init_server(SPEC, 0), largest=LAST), 4, Watched())
        return
    _, row = one_round(plan, answers, NoFolds(), RunState(METHOD.init_server(SPEC, 0), largest=LAST), 4, Watched())
    assert (row.diverged is not None) == named and ("of client c" in (row.diverged or "")) == named


def test_nothing_is_suspected_before_there_was_an_upload():
    assert divergence(["sent q.b with NaN or infinite values"], None) == ""


def test_a_model_that_has_diverged_is_told_on_the_terminal():
    out = io.StringIO()
    row = round_row(2, train_loss=1.0, diverged=divergence(["NaN or infinite values", None], LAST))
    Live(Console(file=out, width=300), 3).round_ended(row)
    assert "of client c, has a change of norm 3464 (limit it with sampling.max_norm)" in out.getvalue()


@dataclass
class Exploding(Recorder):
    """A trainer whose client "1" ends in NaN."""

    def fit(self, asked: Any, rnd: Round) -> Any:
        nan = [one.client.id == "1" and rnd.index == 1 for one in asked]
        answers = super().fit(asked, rnd)
        return [replace(x, adapter=_nan(x.adapter)) if bad else x for bad, x in zip(nan, answers, strict=True)]


def _nan(adapter: Adapter) -> Adapter:
    return {name: replace(part, **{f: x * math.nan for f, x in vars(part).items()}) for name, part in adapter.items()}


@pytest.mark.parametrize("shared", ["a", "ba"])
def test_a_client_whose_training_is_not_finite_has_failed_and_keeps_the_state_it_had(shared):
    method, trainer, clients = FactorAveraging(rank=3, shared=shared), Exploding(ToyTrainer()), toy_clients(3)
    simulation = toy_simulation(method, trainer, clients)
    plan = toy_plan(method, trainer, rounds=3)
    plan = replace(plan, evaluator=None)
    rows = [
        row for _, row in rounds(plan, simulation, MemoryStates(), RunState(method.init_server(SPEC_OF, 0)), 0, Watched())
    ]
    assert [row.rejected for row in rows] == [{}, {"1": "its work ended in NaN or infinite values"}, {}]
    assert all(is_finite(state) for state in simulation.states.saved.values())
    assert {index for client, index in simulation.states.saved if client == "1"} == ({0, 2} if shared == "a" else set())


SPEC_OF = ToyTrainer().spec


@dataclass(frozen=True)
class Stuck(FactorAveraging):
    """FedIT, whose clients' linear algebra fails on client "1"."""

    def work(self, state: Any, download: Any, client: ClientInfo, rnd: Round) -> Any:
        done = yield from super().work(state, download, client, rnd)
        if client.id == "1":
            torch.linalg.svd(torch.full((3, 3), math.nan))
        return done


def test_a_client_whose_linear_algebra_fails_does_not_stop_the_others():
    method, clients = Stuck(rank=3), toy_clients(3)
    simulation, rnd = toy_simulation(method, ToyTrainer(), clients), Round(0, 0)
    sent = {client: method.send(method.init_server(SPEC_OF, 0), client, rnd) for client in clients}
    found = {one.client.id: one for one in simulation.train_clients(rnd, sent, {})}
    assert isinstance(found["1"], Failed) and "LinAlgError" in found["1"].reason
    assert isinstance(found["0"], Reply) and isinstance(found["2"], Reply)
