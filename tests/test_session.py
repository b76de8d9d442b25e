"""What a run does with its settings before the first round."""

import json
import tomllib

import pytest
import torch
from safetensors.torch import load_file

from fedlora.api import run
from fedlora.config.experiment import build
from fedlora.errors import UserError
from fedlora.federated_data import FederatedData
from fedlora.rounds.progress import NullProgress
from fedlora.runs.start import resolve_settings
from fedlora.session import Session, check
from fedlora.train import hardware

from tiny import tiny_rows
from wired import furnish, problem


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("home"))


def experiment(home, **train):
    table = problem(home)
    return build({**table, "rounds": 1, "train": {**table["train"], **train}})


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_base_computes_in_the_precision_that_is_set(home, precision, dtype):
    chosen = experiment(home, precision=precision)
    session = Session.make(chosen, FederatedData.make(chosen))
    assert {p.dtype for p in session.adapted.model.parameters()} == {dtype}
    assert {x.dtype for x in session.adapted.spec.head.values()} == {torch.float32}


def test_labels_that_only_the_test_set_has_are_told_before_training(home, tmp_path):
    rows = [json.loads(line) for line in (home / "rows.jsonl").read_text().splitlines()]
    kept = [json.dumps(row) for row in rows if row["label"] != "west"]
    (tmp_path / "train.jsonl").write_text("\n".join(kept))
    data = {"source": str(tmp_path / "train.jsonl"), "test": str(home / "rows.jsonl")}
    chosen = build({**problem(home), "data": data})
    notes = check(chosen, FederatedData.make(chosen))
    assert "labels of the test set without a training example, which no client learns: 'west'" in notes


@pytest.mark.parametrize("packed", [True, False])
def test_a_run_in_bf16_leaves_an_fp32_adapter_and_says_how_it_trained(home, tmp_path, packed):
    result = run(experiment(home, precision="bf16", packed=packed), tmp_path / "run")
    assert 0 < result.rows[-1].train_loss < 10
    assert {x.dtype for x in load_file(tmp_path / "run/adapter/adapter_model.safetensors").values()} == {torch.float32}
    found = json.loads((tmp_path / "run/environment.json").read_text())
    assert (
        found["clients_per_step"] == 1
        and found["max_tokens"] > 100
        and found["packed"] is found["skips_unused_activations"] is packed
    )


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_whole_model_is_trained_one_client_at_a_time_packed_and_in_fp32(home, tmp_path, precision):
    table = problem(home, "full-ft")
    train = {**table["train"], "clients_per_step": 4, "precision": precision}
    for scope, together in (("modules", 4), ("all", 1)):
        chosen = build({**table, "method": {"name": "full-ft", "scope": scope}, "rounds": 1, "train": train})
        session = Session.make(chosen, FederatedData.make(chosen))
        assert (session.trainer.clients_per_step, session.adapted.packing.works) == (together, True)
        assert not session.notes or precision == "bf16"
    assert {x.dtype for x in session.adapted.spec.head.values()} == {torch.float32}
    rows = run(chosen, tmp_path / "run").rows
    assert 0 < rows[-1].train_loss < 10 and len(rows[-1].accepted) == 4


def test_what_is_written_down_says_what_auto_stood_for(home, tmp_path):
    run(experiment(home, precision="auto"), tmp_path / "run")
    written = tomllib.loads((tmp_path / "run/experiment.toml").read_text())["train"]["precision"]
    assert written == resolve_settings(experiment(home, precision="auto")).train.precision in ("fp32", "bf16")


@pytest.mark.parametrize(("packed", "order"), [(True, "random"), (False, "by-length")])
def test_batches_are_random_by_default_but_by_length_where_padding_would_be_computed(home, tmp_path, packed, order):
    for name, batches in (("auto", "auto"), ("named", order)):
        run(experiment(home, packed=packed, batches=batches), tmp_path / name)
    written = tomllib.loads((tmp_path / "auto/experiment.toml").read_text())["train"]
    assert written["batches"] == order and experiment(home).train.batches == "auto"
    one, other = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("auto", "named"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_on_a_processor_without_its_instructions_is_warned_of_before_the_first_round(
    home, tmp_path, monkeypatch, fast
):
    monkeypatch.setattr(hardware, "fast_in_bf16", lambda device: fast)
    watch = Listening()
    run(experiment(home, precision="bf16"), tmp_path / "run", watch)
    assert watch.heard[-1] == "round 1"
    assert [("bf16" in line and "'auto' to use fp32" in line) for line in watch.heard[:-1]] == [True] * (not fast)


class Listening(NullProgress):
    """Remembers notifications and rounds, in their order."""

    def __init__(self):
        self.heard = []

    def notify(self, message):
        self.heard.append(message)

    def round_started(self, rnd, chosen):
        self.heard.append(f"round {rnd.index + 1}")


def test_a_round_that_chooses_too_few_is_refused_before_anything_is_read(home):
    table = problem(home, sampling={"fraction": 0.25, "min_replies": 2})
    with pytest.raises(UserError, match="only 1 of 4 clients are chosen"):
        FederatedData.make(build(table))


def test_a_client_with_more_examples_than_uploads_may_stand_for_is_refused_before_a_model_is_loaded(home):
    with pytest.raises(UserError, match=r"sampling.max_examples = 3: client '000' has \d+ examples"):
        FederatedData.make(build(problem(home, sampling={"max_examples": 3})))


def test_clients_of_several_tasks_train_and_are_evaluated_once_for_each(home, tmp_path):
    table = problem(home, "fl-tac", rounds=1)
    chosen = build({**table, "data": {**table["data"], "task": "user"}, "clients": {"count": 3, "partition": "iid"}})
    result = run(chosen, tmp_path / "run")
    expected = {f"00{i}/u{task}" for i in range(3) for task in range(4)}
    _, row = result.rows
    assert set(row.clients["accuracy"].each) == set(row.accepted) == set(result.adapters) == expected
    assert 0 <= row.notes["misclustered"] < 1 and row.notes["clusters"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize(("tasks", "most_wrong"), [({"tasks": 3}, 0), ({}, 0.25)])
def test_tasks_with_labels_of_their_own_are_told_apart(home, tmp_path, tasks, most_wrong):
    """Without their number, one of them may be split among clusters, but no two share one."""
    rows = [json.loads(line) for line in tiny_rows(tmp_path / "rows.jsonl", 900).read_text().splitlines()]
    file = tmp_path / "tasks.jsonl"
    file.write_text(
        "\n".join(
            json.dumps({**r, "task": f"t{i % 7 % 3}", "label": f"{i % 7 % 3} {r['label']}"}) for i, r in enumerate(rows)
        )
    )
    table = {
        **problem(home, rounds=4, clients={"count": 5, "partition": "iid"}),
        "data": {"source": str(file), "task": "task"},
        "method": {"name": "fl-tac", "rank": 4, **tasks},
    }
    last = run(build(table, ["train.epochs=2", "train.clients_per_step=16"]), tmp_path / "run").rows[-1].notes
    assert last["merged_tasks"] == 0 and last["misclustered"] <= most_wrong
