"""Budgets of steps in rounds, and privacy for records in whole runs."""

import json
import sys
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fedlora import api
from fedlora.adapter import pack
from fedlora.config.experiment import Experiment, build
from fedlora.config.privacy import Privacy
from fedlora.config.sections import Train
from fedlora.errors import UserError
from fedlora.federated_data import FederatedData
from fedlora.messages import ClientInfo, Fit, FitRequest, Round, Trained
from fedlora.method import global_adapter
from fedlora.methods.lora_a2 import LoRAA2
from fedlora.methods.table import TABLE
from fedlora.models.normalization import check_normalization
from fedlora.privacy.events import Gaussian
from fedlora.privacy.record import ledger, reasons_against, record_privacy
from fedlora.privacy.record_plan import client_privacy
from fedlora.rounds.budgets import Budgets
from fedlora.rounds.simulate import SimulationBackend
from fedlora.rounds.validator import Failed
from fedlora.runs.folder import RunFolder
from fedlora.session import Session, check
from fedlora.train.record_privacy import RecordPrivacy
from tiny_tasks import tiny_task

from tiny import LABELS, tiny_bert, tiny_rows
from toy import SPEC, MemoryStates, ToyTrainer, toy_clients, toy_method
from wired import assert_same_runs

CLIENTS = toy_clients(2)
SILENT = {"clients": "none"}
FACTORS = {"name": "fedit", "rank": 2}
WEIGHTS = {"name": "full-ft"}
ALL = {"name": "full-ft", "scope": "all"}
PRIVACY = {"unit": "record", "clip": 0.5, "noise_multiplier": 1.0, "delta": 1e-5}


def budgets(**steps: int) -> Budgets:
    """Budgets of these clients, whose trainings have 3 steps."""
    return Budgets({name[1:]: n for name, n in steps.items()}, lambda _: 3)


def toy(method: Any = None, trainer: Any = None, **steps: int) -> SimulationBackend:
    method = method or toy_method(TABLE["fedit"])
    return SimulationBackend(method, SPEC, CLIENTS, MemoryStates(), trainer or ToyTrainer(), 0, budgets(**steps))


def one_round(backend: SimulationBackend, index: int, attempt: int = 0) -> list[Any]:
    rnd = Round(index, 0, attempt)
    sent = {client: backend.method.send(backend.method.init_server(SPEC, 0), client, rnd) for client in CLIENTS}
    return list(backend.train_clients(rnd, sent, {}))


def test_a_client_sits_out_when_its_next_training_would_exceed_its_steps():
    backend = toy(_0=7, _1=100)
    for index, left in enumerate((3, 6)):
        assert not any(isinstance(reply, Failed) for reply in one_round(backend, index))
        assert backend.private_steps(CLIENTS[0], index + 1) == left
    first, second = one_round(backend, 2)
    assert isinstance(first, Failed) and "it has made 6 of 7 steps" in first.reason
    assert not isinstance(second, Failed)
    assert [backend.private_steps(client, 3) for client in CLIENTS] == [6, 9]
    assert backend.private_steps(CLIENTS[0], 0) == 0


def test_every_training_counts_also_those_of_a_client_that_fails_later():
    """LoRA-A2 probes before it trains; a client without steps for both sits out after the probe."""
    backend = toy(LoRAA2(5), _0=3, _1=6)
    first, second = one_round(backend, 0)
    assert isinstance(first, Failed) and not isinstance(second, Failed)
    assert [backend.private_steps(client, 1) for client in CLIENTS] == [3, 6]
    assert [isinstance(reply, Failed) for reply in one_round(backend, 1)] == [True, True]
    assert [backend.private_steps(client, 2) for client in CLIENTS] == [3, 6]


@dataclass(frozen=True)
class _Diverging(ToyTrainer):
    def fit(self, asked: Any, rnd: Round) -> list[Trained]:
        found = super().fit(asked, rnd)
        return [replace(one, adapter=_nan(one.adapter)) for one in found]


def _nan(adapter: Any) -> Any:
    return {name: type(part)(**{f: x * torch.nan for f, x in vars(part).items()}) for name, part in adapter.items()}


def test_a_client_that_diverges_has_spent_its_steps():
    backend = toy(trainer=_Diverging(), _0=7, _1=7)
    assert all(isinstance(reply, Failed) for reply in one_round(backend, 0))
    assert backend.private_steps(CLIENTS[0], 1) == 3


def test_a_repeated_attempt_counts_twice_and_a_repeated_round_once():
    backend = toy(_0=100, _1=100)
    one_round(backend, 0)
    one_round(backend, 0, attempt=1)
    assert backend.private_steps(CLIENTS[0], 1) == 6
    one_round(backend, 0)  # after a restart
    assert backend.private_steps(CLIENTS[0], 1) == 3
    one_round(backend, 0, attempt=1)
    assert backend.private_steps(CLIENTS[0], 1) == 6


def test_states_of_clients_without_a_budget_are_stored_as_ever():
    with_budget, without = toy(toy_method(TABLE["fedsa-lora"]), _0=100), toy(toy_method(TABLE["fedsa-lora"]))
    replies = [one_round(backend, 0) for backend in (with_budget, without)]
    for client in CLIENTS:
        views = [
            b.view(client, b.method.send(b.method.init_server(SPEC, 0), client, Round(1, 0)), Round(1, 0))
            for b in (with_budget, without)
        ]
        assert_close(pack(views[0]), pack(views[1]), rtol=0, atol=0)
    assert replies[0][0].upload.values.keys() == replies[1][0].upload.values.keys()
    assert without.private_steps(CLIENTS[0], 1) == 0 and len(without.states.saved) == 2


def test_the_ledger_of_a_client_has_the_steps_that_it_made():
    assert ledger(RecordPrivacy(1.0, 2.0, 0.25, 9), 6) == [Gaussian(2.0, 0.25, 6)]
    assert ledger(RecordPrivacy(1.0, 2.0, 0.25, 9), 0) == []


def test_the_rate_is_a_batch_of_the_examples_and_the_steps_are_those_of_all_trainings():
    train, privacy = Train(batch_size=8, epochs=2), Privacy(**PRIVACY)
    assert record_privacy(privacy, train, 40, 30) == RecordPrivacy(0.5, 1.0, 0.2, 30)
    assert record_privacy(privacy, train, 5, 30).rate == 1
    given = build(
        {
            "rounds": 7,
            "method": {"name": "lora-a2", "rank": 5},
            "train": train.model_dump(),
            "evaluate": SILENT,
            "privacy": PRIVACY,
        }
    )
    client, probe = ClientInfo("x", 3, 1), LoRAA2(5).probe_epochs

    def steps(experiment: Experiment) -> int:
        return client_privacy(experiment, LoRAA2(5), SPEC, [client], {"x": range(41)})["x"].steps

    assert steps(given) == 7 * (probe + 2) * 6  # ceil(41 / 8) steps in an epoch
    few = given.model_copy(update={"privacy": Privacy(**PRIVACY, participations=2)})
    assert steps(few) == 2 * (probe + 2) * 6


def test_a_target_epsilon_gives_the_noise_for_the_rate_and_all_steps(monkeypatch):
    account = ModuleType("account")
    account.noise_for = lambda epsilon, delta, rate, steps: epsilon + delta + rate + steps
    monkeypatch.setitem(sys.modules, "fedlora.privacy.account", account)
    privacy = Privacy(unit="record", epsilon=3.0, delta=1e-5)
    assert record_privacy(privacy, Train(batch_size=10), 40, 30).noise_multiplier == 3.0 + 1e-5 + 0.25 + 30


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"train": {"batches": "by-length"}}, "train.batches"),
        ({"train": {"clip_norm": 1.0}}, "train.clip_norm"),
        ({"task": {"kind": "classification", "class_weights": [1.0, 2.0]}}, "task.class_weights"),
        ({"task": {"kind": "causal-lm"}}, "task.kind = 'causal-lm' with plain texts (data.text)"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_settings_that_do_not_fit_are_refused_by_name(changes, names):
    (reason,) = reasons_against(build({**changes, "evaluate": SILENT, "privacy": PRIVACY}))
    assert reason.startswith(names)
    assert not list(reasons_against(build(changes)))


@pytest.mark.parametrize("columns", [{"prompt": "q", "response": "a"}, {"messages": "m"}], ids=["pairs", "conversations"])
def test_a_language_model_may_train_on_prompts_with_answers_and_on_conversations(columns):
    assert not list(reasons_against(build({"task": "causal-lm", "data": columns, "evaluate": SILENT, "privacy": PRIVACY})))


def test_a_run_and_its_check_refuse_them_before_the_model_is_read(texts):
    given = experiment(texts, train={"clip_norm": 1.0}, model="nowhere")
    for call in (Session.make, check):
        with pytest.raises(UserError, match=r"^train\.clip_norm = 1: privacy\.clip"):
            call(given, FederatedData.make(given))


def test_a_model_with_batch_normalization_is_refused():
    with pytest.raises(UserError, match=r"^1 normalizes over the examples"):
        check_normalization(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)))
    check_normalization(torch.nn.LayerNorm(2))


def experiment(settings: dict[str, Any], **tables: Any) -> Experiment:
    given: dict[str, Any] = {
        "rounds": 2,
        "clients": {"count": 3, "partition": "iid", "held_out": 0.0},
        "method": FACTORS,
        "evaluate": {"before": False, "clients": "none"},
        "privacy": PRIVACY,
    }
    merged = {key: {**settings.get(key, {}), **x} if isinstance(x, dict) else x for key, x in (given | tables).items()}
    return build({**settings, **merged, "train": {"batch_size": 4, "lr": 0.05, "device": "cpu", **tables.get("train", {})}})


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    home = tmp_path_factory.mktemp("texts")
    return {"model": str(tiny_bert(home / "bert")), "data": {"source": str(tiny_rows(home / "rows.jsonl", 48))}}


def spent(given: Experiment, path: Any, rounds: int) -> list[Any]:
    session = Session.make(given, FederatedData.make(given))
    return [list(session.spent(client, RunFolder(path), rounds)) for client in session.clients]


def test_no_example_is_held_out_also_on_a_node(texts):
    """Its scores could not leave the client; which ones are held out would depend on their number."""
    given = experiment(texts, clients={"count": 3, "partition": "iid", "held_out": 0.4})
    plain = given.model_copy(update={"privacy": Privacy()})
    for make in (FederatedData.make, lambda x: FederatedData.of_client(x, "a", texts["data"]["source"], 2, LABELS)):
        found, other = make(given).partition.shares, make(plain).partition.shares
        assert [one.train for one in found] == [tuple(sorted(one.train + one.held_out)) for one in other]
        assert not any(one.held_out for one in found) and all(one.held_out for one in other)


def test_an_exported_adapters_card_counts_only_the_examples_with_targets_as_the_runs_own(tmp_path):
    """Every third question has options that are too long, and thus no target."""
    settings = tiny_task("multiple-choice", tmp_path / "home")
    file = tmp_path / "home" / "rows.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows[::3]:
        row["options"] = [" ".join([text] * (1 if text == row["answer"] else 99)) for text in row["options"]]
    file.write_text("\n".join(map(json.dumps, rows)))
    train = {"max_length": 64, "batches": "random"}
    api.run(experiment(settings, rounds=1, train=train, evaluate={"clients": "none"}), out=tmp_path / "run")
    found = api.export(tmp_path / "run", "adapter", tmp_path / "out")
    own, exported = ((folder / "README.md").read_text() for folder in (tmp_path / "run" / "adapter", found[""]))
    assert "training examples of the largest client" in own
    assert exported == own


@pytest.mark.parametrize("method", [FACTORS, WEIGHTS, ALL], ids=str)
def test_a_resumed_run_has_the_noise_and_the_ledger_of_one_without_interruption(texts, tmp_path, method):
    whole, cut = experiment(texts, method=method), experiment(texts, rounds=1, method=method)
    api.run(whole, out=tmp_path / "whole")
    api.run(cut, out=tmp_path / "cut")
    api.resume(tmp_path / "cut", overrides=["rounds=2"])
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")
    ledgers = [spent(whole, tmp_path / name, 2) for name in ("whole", "cut")]
    sizes = [len(share.train) for share in FederatedData.make(whole).partition.shares]
    assert ledgers[0] == ledgers[1] == [[Gaussian(1.0, min(1, 4 / n), 2 * -(-n // 4))] for n in sizes]


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *((kind, FACTORS) for kind in ("classification", "regression", "image-classification", "tagging")),
        *((kind, FACTORS) for kind in ("multiple-choice", "causal-lm", "seq2seq")),
        ("multiple-choice", WEIGHTS),
        ("seq2seq", WEIGHTS),
        ("causal-lm", ALL),
        pytest.param("image-classification", ALL, marks=pytest.mark.slow),
        pytest.param("seq2seq", ALL, marks=pytest.mark.slow),
    ],
    ids=lambda x: x if isinstance(x, str) else " ".join(map(str, x.values())),
)
def test_each_task_trains_privately_as_without_privacy_but_for_clip_noise_and_sampling(kind, method, tmp_path):
    """Without them, on all examples of a client in each step; models without dropout, images without augmentation."""
    settings = tiny_task(kind, tmp_path / "home")
    settings["task"] = kind
    settings["evaluate"] = {}
    free = {**PRIVACY, "clip": 1e6, "noise_multiplier": 0.0}
    train = {"optimizer": "sgd", "batch_size": 100, "epochs": 2, "reduction": "example"}
    found = []
    for privacy in (free, {}):
        given = experiment(settings, privacy=privacy, train=train, method=method)
        session = Session.make(given, FederatedData.make(given))
        server = session.method.init_server(session.adapted.spec, 0)
        start = global_adapter(session.method, session.adapted.spec, server, Round(0, 0))
        factors = frozenset(f for part in start.values() for f in vars(part))
        asked = [FitRequest(Fit(start, factors), client, 0) for client in session.clients]
        found.append(session.trainer.fit(asked, Round(0, 0)))
    for one, other in zip(*found, strict=True):
        assert one.steps == other.steps == 2
        before, after = pack(one.adapter), pack(other.adapter)
        assert_close(before, after, rtol=1e-3, atol=1e-5)
        assert any(x.abs().max() > 1e-4 for key, x in after.items() if key.endswith((".b", ".delta")))
