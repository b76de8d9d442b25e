"""The row of a round: what it has of each client, its line of JSON, and the row of the model before training."""

import json
import math
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from test_loop import Metered
from test_validator import MEMBERS, Answers, run_rounds, upload

from fedlora.config.sections import Evaluate
from fedlora.errors import UserError
from fedlora.messages import Round
from fedlora.method import global_adapter
from fedlora.methods.averaging import FactorAveraging
from fedlora.methods.flora import FLoRA
from fedlora.rounds.loop import run_rounds as rounds
from fedlora.rounds.plan import RunState
from fedlora.rounds.row import ClientRow, LargestUpload, RoundRow, Seconds, from_json, to_json
from fedlora.rounds.score_summary import Summary
from fedlora.rounds.validator import Failed
from fedlora.runs.folder import RunFolder

from rows import round_row, untimed
from toy import MemoryStates, Quiet, ToyTrainer, toy_clients, toy_plan, toy_simulation

FULL = round_row(
    3,
    attempts=2,
    chosen=["a", "b"],
    accepted=["a"],
    rejected={"b": "too large"},
    clipped={"a": 0.5},
    per_client={"a": ClientRow(20, 10, 7.0, 0.25, 3), "b": ClientRow(20, 10)},
    bytes_up=40,
    bytes_down=20,
    bytes_eval=30,
    train_loss=0.25,
    largest_upload=LargestUpload("a", 1.5),
    diverged="half of it",
    aggregation_error=1e-3,
    global_={"accuracy": 0.5, "examples": 8},
    clients={"accuracy": Summary(0.5, 0.25, 0.125, {"a": 0.25, "b": 0.75})},
    held_out={"a": 3, "b": 4},
    seconds=Seconds(1.0, 2.0, 3.0),
    notes={"clusters": 2.0},
)


def line(row: RoundRow) -> dict[str, Any]:
    """What a line of the log is read as."""
    return json.loads(json.dumps(to_json(row), allow_nan=False))


def played(method: Any, evaluate: Evaluate, first: bool = True) -> tuple[list[RoundRow], RunState, Metered]:
    """Rows of three rounds, and of the model before them if that is `first`; the state after them, and what passed."""
    trainer = ToyTrainer()
    backend = Metered(toy_simulation(method, trainer, toy_clients()))
    plan = replace(toy_plan(method, trainer), evaluate=evaluate)
    start = RunState(method.init_server(trainer.spec, 0))
    found = list(rounds(plan, backend, MemoryStates(), start, 0, Quiet(), first))
    return [row for _, row in found], found[-1][0], backend


def test_a_line_is_read_as_the_row_that_was_written():
    assert from_json(line(FULL)) == FULL
    assert from_json(line(round_row(0))) == round_row(0)


def test_every_row_of_a_run_is_read_as_it_was_written_and_nothing_of_its_line_is_lost():
    for row in played(FLoRA(rank=3), Evaluate())[0]:
        assert from_json(line(row)) == row and line(from_json(line(row))) == line(row)


def test_the_methods_own_numbers_are_keys_beside_the_others():
    assert line(FULL)["clusters"] == 2.0 and "notes" not in line(FULL)


def test_an_absent_value_has_no_key_and_one_that_is_not_finite_is_null():
    row = round_row(1, train_loss=math.nan, per_client={"a": ClientRow(2, 1, 3.0, math.inf, 4), "b": ClientRow(2, 1)})
    assert line(row)["train_loss"] is None and line(row)["per_client"]["a"]["loss"] is None
    assert "loss" not in line(row)["per_client"]["b"] and "bytes_eval" not in line(row)
    read = from_json(line(row))
    assert math.isnan(read.train_loss) and math.isnan(read.per_client["a"].loss)
    assert read.per_client["b"].loss is None and read.bytes_eval is None


def test_a_row_without_a_version_is_rejected():
    with pytest.raises(ValueError, match="expected version 1 of a row, found None"):
        from_json({key: value for key, value in line(FULL).items() if key != "version"})


def test_a_log_with_a_row_of_another_version_is_rejected_before_anything_is_trained(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    folder.commit(1, None, round_row(1))
    folder.commit(2, None, round_row(2, version=2))
    with pytest.raises(UserError, match=r"rounds.jsonl: line 2: expected version 1 of a row, found 2"):
        folder.restore()
    folder.release()


def test_an_invalid_row_is_rejected_by_its_key():
    with pytest.raises(ValueError, match=r"per_client\.a\.steps: Input should be a valid integer"):
        from_json({**line(FULL), "per_client": {"a": {"steps": "many"}}})


@pytest.mark.parametrize("clients", ["none", "all"])
def test_the_bytes_of_the_clients_add_up_to_those_of_the_round(clients):
    for row in played(FLoRA(rank=3), Evaluate(clients=clients))[0]:
        assert sum(one.bytes_up for one in row.per_client.values()) == row.bytes_up
        assert sum(one.bytes_down for one in row.per_client.values()) == row.bytes_down
        assert list(row.per_client) == row.chosen


def test_each_client_has_the_loss_the_steps_and_the_weight_of_its_reply():
    found, _, backend = played(FactorAveraging(rank=3), Evaluate())
    for reply in backend.replies:
        one = found[reply.round.index + 1].per_client[reply.client.id]
        assert (one.loss, one.steps, one.weight) == (reply.loss, reply.steps, reply.weight)


def test_a_rejected_client_has_bytes_and_no_loss_and_one_that_failed_has_sent_nothing():
    def bend(reply):
        if reply.client.id == "a":
            return [Failed(reply.client, "its node is gone")]
        return [upload(**{"q.b": lambda x: None})(reply) if reply.client.id == "b" else reply]

    _, row = run_rounds(Answers(MEMBERS[:3], bend))
    failed, rejected, accepted = (row.per_client[client] for client in "abc")
    assert failed == ClientRow(0, accepted.bytes_down)
    assert rejected == ClientRow(rejected.bytes_up, accepted.bytes_down) and 0 < rejected.bytes_up < accepted.bytes_up
    assert accepted.loss == 1.0


def test_a_client_of_two_attempts_has_the_bytes_of_both_and_the_loss_of_the_last():
    def bend(reply):
        poor = reply.client.id == "a" or (reply.round.attempt == 0 and reply.client.id == "b")
        return [Failed(reply.client, "no")] if poor else [replace(reply, loss=float(reply.round.attempt))]

    _, row = run_rounds(Answers(MEMBERS[:3], bend), min_replies=2)
    assert row.attempts == 2 and row.accepted == ["b", "c"]
    once, twice, single = row.per_client["b"], row.per_client["c"], run_rounds(Answers(MEMBERS[:3]))[1].per_client["c"]
    assert (once.bytes_up, once.bytes_down) == (single.bytes_up, 2 * single.bytes_down)
    assert (twice.bytes_up, twice.bytes_down) == (2 * single.bytes_up, 2 * single.bytes_down)
    assert once.loss == twice.loss == 1.0


def test_times_are_utc_and_a_round_does_not_end_before_it_starts():
    found, _, _ = played(FactorAveraging(rank=3), Evaluate())
    assert all(row.started <= row.ended and row.started.utcoffset() == timedelta(0) for row in found)
    assert [row.started for row in found] == sorted(row.started for row in found)
    assert line(found[0])["started"].endswith("Z")


def test_the_row_before_training_has_the_scores_of_the_initial_model_and_nothing_of_training():
    method, trainer = FactorAveraging(rank=3), ToyTrainer()
    first = played(method, Evaluate())[0][0]
    initial = global_adapter(method, trainer.spec, method.init_server(trainer.spec, 0), Round(0, 0))
    assert first.round == 0 and first.global_ == trainer.evaluate(initial)
    each = {client.id: -float(trainer.loss(initial, client.id)) for client in toy_clients()}
    assert first.clients["accuracy"].each == each
    assert first.held_out == {client.id: client.examples for client in toy_clients()}
    scores = {"bytes_eval", "global", "clients", "held_out"}
    assert line(first).keys() == {"round", "version", "started", "ended", "seconds", *scores}


@pytest.mark.parametrize("method", [FLoRA(rank=3), FactorAveraging(rank=3, shared="a")])
def test_evaluating_the_model_before_training_changes_no_later_row_and_no_state(method):
    (_, *rows), state, _ = played(method, Evaluate())
    others, other, _ = played(method, Evaluate(), first=False)
    assert [untimed(row) for row in rows] == [untimed(row) for row in others]
    assert all(row.train_loss is not None for row in rows) and state.base_updates == other.base_updates


def test_before_training_no_client_has_been_chosen():
    first = played(FactorAveraging(rank=3), Evaluate(clients="chosen"))[0][0]
    assert first.clients is None and first.bytes_eval is None and first.global_ is not None
