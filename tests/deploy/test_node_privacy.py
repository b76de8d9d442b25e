"""Privacy that a node enforces, whatever its server asks for: the trainer, the ledger and what is sent."""

import math
from dataclasses import replace

import pytest

from fedlora.config.experiment import build
from fedlora.config.policy import Policy
from fedlora.deploy import run_privacy
from fedlora.deploy.policy import budgets
from fedlora.deploy.privacy_ledger import PrivacyLedger, Release, default_folder
from fedlora.deploy.reasons import NodeFailure, Reason
from fedlora.deploy.wire import HandshakeReply, Rejected
from fedlora.errors import RunStopped
from fedlora.messages import Gradient
from fedlora.privacy import account
from fedlora.privacy.events import Gaussian, Truncation
from fedlora.rounds.codec import decode, encode_state
from fedlora.train import local
from fedlora.train.record_privacy import RecordPrivacy
from hostile import Owner, furnish, handshake, reason_of, trained

from tiny import LABELS
from wired import problem

HARMLESS = {"unit": "record", "epsilon": 3.0, "delta": 1e-5, "clip": 1.0}
LIMITS = {"unit": "record", "epsilon": 4.0, "run_epsilon": 2.0, "delta": 1e-6, "clip": 0.5}
REAL_ACCOUNT = run_privacy.composed
"""Of a node, without a stand-in."""
TRAIN = {"batch_size": 5, "max_steps": 2, "max_length": 16, "lr": 1e-2, "device": "cpu"}


def epsilon(releases, delta):
    """A simple account: squares of rate / noise add up."""
    if any(one.count and not one.noise_multiplier for one in releases):
        return math.inf
    return math.sqrt(sum(one.count * (one.rate / one.noise_multiplier) ** 2 for one in releases if one.count))


def noise_for(target, delta, rate, steps):
    return rate * math.sqrt(steps) / target * (1 + 1e-9)


@pytest.fixture(autouse=True)
def simple_account(monkeypatch):
    monkeypatch.setattr(run_privacy, "composed", epsilon)
    monkeypatch.setattr(run_privacy, "noise_for", noise_for)
    monkeypatch.setattr("fedlora.privacy.account.noise_for", noise_for)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("home"))


def joined(home, folder, privacy=HARMLESS, limits=LIMITS, **more):
    """A node that has answered the handshake of a run, and the answer."""
    owner = Owner(home, folder, accept=limits is None, policy=None if limits is None else Policy(privacy=limits))
    table = {"privacy": privacy, "train": TRAIN, "rounds": 2, "evaluate": {"clients": "none"}, **more}
    return owner, owner.handshake(home, **table)


def releases():
    return [
        release
        for path in default_folder().glob("*.json")
        for release in PrivacyLedger(path.parent, path.stem, epsilon).releases()
    ]


HOSTILE = {
    "no noise": {"privacy": {"unit": "record", "noise_multiplier": 0.0, "delta": 1e-5}},
    "hardly any noise": {"privacy": {**HARMLESS, "epsilon": 1e6}},
    "no clip": {"privacy": {**HARMLESS, "clip": 1e9}},
    "all examples in each batch": {"train": {**TRAIN, "batch_size": 10**6}},
    "many steps": {"train": {**TRAIN, "max_steps": 1000}},
    "a large delta": {"privacy": {**HARMLESS, "delta": 0.5}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_a_server_asks_for_the_trainer_has_the_nodes_own_clip_noise_and_randomness(home, tmp_path, name):
    owner, answer = joined(home, tmp_path / "node", **HOSTILE[name])
    assert isinstance(answer, HandshakeReply)
    trainer = owner.node._run("r").simulation.trainer
    (own,) = trainer.noise.values()
    rows = len(trainer.trainer.rows["clinic"])
    assert own.rate == min(1.0, HOSTILE[name].get("train", TRAIN)["batch_size"] / rows)
    assert own.clip <= 0.5 and own.noise_multiplier >= noise_for(2.0, 1e-6, own.rate, own.steps)
    assert trainer.trainer.privacy == {"clinic": own} and trainer.trainer.entropy == "os"


def test_a_clip_that_is_lost_in_rounding_is_refused(home, tmp_path):
    owner = Owner(home, tmp_path / "node", policy=Policy(privacy=LIMITS), accept=False)
    asked = handshake(home, privacy=HARMLESS, train=TRAIN, evaluate={"clients": "none"})
    clip = asked.experiment.replace("clip = 1.0", "clip = 1e-30")
    assert clip != asked.experiment
    answer = owner.ask(asked.model_copy(update={"experiment": clip}))
    assert isinstance(answer, Rejected) and answer.failure.reason is Reason.EXPERIMENT
    assert "privacy.clip = 1e-30: expected a finite number of at least 1e-06" in owner.told[-1]


def begun(folder, run="r", spent=(), **limits):
    """The clients of a run, of which two are promised as many steps at two rates, on a ledger with these releases."""
    ledger = PrivacyLedger(folder, "d", epsilon)
    ledger.reserve(spent, [])
    policy = Policy(privacy={"unit": "record", "delta": 1e-6, **limits})
    experiment = build(problem(folder, privacy=HARMLESS, evaluate={"clients": "none"}))
    asked = {"one": RecordPrivacy(1.0, 0.1, 0.5, 30), "other": RecordPrivacy(1.0, 0.1, 0.2, 30)}
    privacy = run_privacy.RunPrivacy(experiment, policy, run, ledger, lambda line: None)
    return privacy, privacy._own(asked)


def take_all_steps(privacy, own):
    """Reserves the promised steps of all clients in turns."""
    for _ in range(30):
        steps = [privacy._release(name, one.noise_multiplier, one.rate, 1) for name, one in own.items()]
        privacy.ledger.reserve(steps, budgets(privacy.policy.privacy))


def test_the_noise_of_several_clients_of_a_node_lasts_for_all_their_steps(tmp_path):
    privacy, own = begun(tmp_path, epsilon=2.0)
    take_all_steps(privacy, own)
    assert len(privacy.ledger.releases()) == 60  # none was refused


OTHERS = Release(run="s", client="one", unit="record", noise_multiplier=1.0, rate=1.0, count=1)  # epsilon is 1


def test_a_run_has_the_noise_for_what_other_runs_have_left_of_the_budget(tmp_path):
    privacy, own = begun(tmp_path, spent=[OTHERS], epsilon=1.2, run_epsilon=1.0)
    take_all_steps(privacy, own)
    _, again = begun(tmp_path, epsilon=1.2, run_epsilon=1.0)  # after a restart, its own steps do not count as others'
    assert again == own


def test_a_run_for_which_hardly_anything_is_left_is_not_begun(tmp_path):
    with pytest.raises(NodeFailure) as failed:
        begun(tmp_path, spent=[OTHERS], epsilon=1.05, run_epsilon=1.0)
    assert failed.value.reason is Reason.BUDGET


def test_an_upload_has_the_nodes_noise_though_the_server_asks_for_none(home, tmp_path, monkeypatch):
    asked = {
        "privacy": {"unit": "record", "noise_multiplier": 0.0, "delta": 1e-5},
        "train": {**TRAIN, "optimizer": "sgd"},
    }
    quiet, _ = joined(home, tmp_path / "quiet", limits=None, **asked)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "of another user"))
    noisy, _ = joined(home, tmp_path / "noisy", limits={**LIMITS, "epsilon": 1e-3, "run_epsilon": 1e-3}, **asked)
    changes = []
    for owner in (quiet, noisy):
        assert reason_of(trained(owner)) is None
        changes.append(max(float(x.abs().max()) for name, x in decode(owner.payloads[0]).items() if name.endswith(".b")))
    assert changes[1] > 100 * changes[0]  # b begins at 0


def test_the_noise_does_not_follow_from_the_seed_that_the_server_knows(home, tmp_path):
    uploads = []
    for folder in ("one", "other"):
        owner, _ = joined(home, tmp_path / folder)
        trained(owner)
        uploads.append(owner.payloads)
    assert uploads[0] != uploads[1]


def test_a_repeated_request_is_answered_with_the_same_bytes_and_spends_nothing(home, tmp_path, monkeypatch):
    owner, _ = joined(home, tmp_path / "node")
    assert reason_of(trained(owner)) is None
    first, spent = owner.payloads, releases()
    assert spent[0].count == 2 and spent[0].settled
    owner.stop()
    owner, _ = joined(home, tmp_path / "node")  # also after the node restarts
    monkeypatch.setattr(local.LocalTrainer, "fit", None)
    for attempt in (0, 1):
        assert reason_of(trained(owner, attempt=attempt)) is None
        assert owner.payloads == first
    assert releases() == spent


def test_a_repeated_request_restores_the_state_that_a_resumed_server_discards(home, tmp_path):
    owner, _ = joined(home, tmp_path / "node", method="fedsa-lora")
    assert reason_of(trained(owner)) is None
    first, folder = owner.payloads, owner.node._run("r").folder
    (client,) = owner.node._run("r").clients()
    state = encode_state(folder.client_state(client, 1))
    owner.stop()
    owner, _ = joined(home, tmp_path / "node", method="fedsa-lora", session="2")
    folder = owner.node._run("r").folder
    assert folder.client_state(client, 1) is None
    assert reason_of(trained(owner)) is None and owner.payloads == first
    assert encode_state(folder.client_state(client, 1)) == state


def test_the_same_round_with_another_download_is_a_training_of_its_own(home, tmp_path):
    owner, _ = joined(home, tmp_path / "node")
    trained(owner)
    first = owner.payloads
    assert reason_of(trained(owner, change=lambda x: x + 1)) is None
    assert owner.payloads != first
    assert sum(one.count for one in releases()) == 4


def test_a_client_takes_no_more_steps_than_its_noise_was_computed_for(home, tmp_path):
    owner, _ = joined(home, tmp_path / "node")
    assert [reason_of(trained(owner, 0, change=lambda x, i=i: x + i)) for i in range(3)] == [None, None, Reason.BUDGET]
    assert "4 of 4 steps" in owner.told[-1]


def test_a_spent_budget_refuses_the_next_round_and_the_next_run_whatever_its_id(home, tmp_path):
    limits = {**LIMITS, "epsilon": 2.0, "delta": 1e-6}
    owner, _ = joined(home, tmp_path / "node", limits=limits)
    assert [reason_of(trained(owner, index)) for index in range(2)] == [None, None]
    owner.stop()
    for run, seed in (("r", 0), ("another", 0), ("a third", 1)):
        owner, answer = joined(home, tmp_path / "node", limits=limits, run=run, seed=seed)
        assert isinstance(answer, Rejected) and answer.failure.reason is Reason.BUDGET, owner.told
        assert "of all runs is epsilon 2 at delta 1e-06" in owner.told[-1] or "of one run" in owner.told[-1]


@pytest.mark.parametrize("change", [{"labels": LABELS[::-1]}, {"clients": {"held_out": 0.3}}, {"seed": 7}])
def test_a_server_opens_no_new_account_by_other_settings(home, tmp_path, change):
    paths = []
    for run, more in (("r", {}), ("s", change)):
        owner, answer = joined(home, tmp_path / "node", run=run, **more)
        assert isinstance(answer, HandshakeReply)
        paths.append(owner.node._run(run).privacy.ledger.path)
    assert paths[0] == paths[1]


def test_a_node_with_another_folder_opens_no_new_account(home, tmp_path):
    limits = {**LIMITS, "epsilon": 2.0}
    owner, _ = joined(home, tmp_path / "node", limits=limits)
    assert [reason_of(trained(owner, index)) for index in range(2)] == [None, None]
    owner, answer = joined(home, tmp_path / "a new folder", limits=limits, run="s")
    assert isinstance(answer, Rejected) and answer.failure.reason is Reason.BUDGET


def test_a_crash_between_the_ledger_and_the_training_is_spent(home, tmp_path, monkeypatch):
    owner, _ = joined(home, tmp_path / "node")

    def crashes(*_):
        raise RunStopped("killed")

    with monkeypatch.context() as patch:
        patch.setattr(local.LocalTrainer, "fit", crashes)
        assert reason_of(trained(owner)) is not None
    before = releases()
    assert before and not any(one.settled for one in before) and {one.count for one in before} == {2}


def test_the_steps_really_taken_replace_the_reserved_ones(home, tmp_path, monkeypatch):
    owner, _ = joined(home, tmp_path / "node")
    fit = local.LocalTrainer.fit
    monkeypatch.setattr(
        local.LocalTrainer, "fit", lambda self, asked, rnd: [replace(one, steps=1) for one in fit(self, asked, rnd)]
    )
    trained(owner)
    assert [(one.count, one.settled) for one in releases()] == [(1, True)]


def test_a_damaged_ledger_refuses_the_run(home, tmp_path):
    owner, _ = joined(home, tmp_path / "node")
    trained(owner)
    (path,) = default_folder().glob("*.json")
    path.write_bytes(path.read_bytes()[:-9])
    owner.stop()
    owner, answer = joined(home, tmp_path / "node")
    assert isinstance(answer, Rejected) and answer.failure.reason is Reason.LEDGER and "damaged" in owner.told[-1]


def test_under_privacy_no_count_loss_step_or_score_is_sent(home, tmp_path):
    owner, answer = joined(home, tmp_path / "node")
    assert [client.examples for client in answer.clients] == [1]
    result = trained(owner).results[0]
    assert result.weight == 1 and math.isnan(result.loss) and result.steps == 0 and result.examples == 0
    assert reason_of(trained(owner, kind="evaluate")) is Reason.NOT_PRIVATE


def test_public_counts_are_sent_if_the_policy_allows_it(home, tmp_path):
    privacy = {**HARMLESS, "public_counts": True}
    _, answer = joined(home, tmp_path / "node", privacy=privacy, limits={**LIMITS, "public_counts": True})
    assert [client.examples for client in answer.clients] == [20]


def test_features_and_gradients_are_refused_by_the_trainer(home, tmp_path):
    owner, _ = joined(home, tmp_path / "node")
    run = owner.node._run("r")
    (client,) = run.clients()
    for ask in (
        lambda: run.simulation.trainer.features(client),
        lambda: run.simulation.trainer.gradient(client, Gradient({}, frozenset("b"))),
        lambda: run.simulation.trainer.scores([(client, {})]),
    ):
        with pytest.raises(Exception, match="nothing else") as refused:
            ask()
        assert refused.value.reason is Reason.NOT_PRIVATE


def test_a_node_counts_the_truncation_of_cohorts_at_its_cost(home, tmp_path):
    privacy = {"unit": "client", "noise_multiplier": 2.0, "delta": 1e-5, "largest_cohort": 6}
    clients = {"clients": {"count": 10}, "sampling": {"fraction": 0.5}}
    owner, _ = joined(
        home, tmp_path / "node", privacy=privacy, limits={"unit": "client", "epsilon": 9.0, "delta": 1e-6}, **clients
    )
    assert reason_of(trained(owner, 0)) is None
    (release,) = releases()
    assert release.truncation == Truncation(6, 10)
    plain = release.model_copy(update={"truncation": None})
    assert REAL_ACCOUNT([release], 1e-6) == account.epsilon([Gaussian(2.0, 0.5, 2, Truncation(6, 10))], 1e-6)
    assert REAL_ACCOUNT([release], 1e-6) > REAL_ACCOUNT([plain], 1e-6)


def test_a_run_with_privacy_for_clients_is_counted_once_with_all_its_rounds(home, tmp_path):
    privacy = {"unit": "client", "noise_multiplier": 2.0, "delta": 1e-5}
    limits = {"unit": "client", "epsilon": 1.0, "delta": 1e-6}
    owner, answer = joined(home, tmp_path / "node", privacy=privacy, limits=limits)
    assert isinstance(answer, HandshakeReply) and releases() == []
    for index in range(2):
        assert reason_of(trained(owner, index)) is None
    table = {"unit": "client", "client": "clinic", "noise_multiplier": 2.0, "rate": 1.0}
    assert releases() == [Release(run="r", count=2, **table)]
    owner.stop()
    owner, answer = joined(home, tmp_path / "node", privacy=privacy, limits=limits, run="s", rounds=3)
    assert isinstance(answer, Rejected) and answer.failure.reason is Reason.BUDGET


def test_a_server_that_returns_with_less_noise_or_larger_samples_is_counted_anew(home, tmp_path):
    limits = {"unit": "client", "epsilon": 3.0, "delta": 1e-6}
    asked = [(2.0, 0.5), (2.0, 0.5), (1.0, 0.5), (1.0, 1.0), (2.0, 0.5)]  # 0.35, nothing, 0.71, 1.41, nothing
    for noise, rate in asked:
        privacy, sampling = {"unit": "client", "noise_multiplier": noise, "delta": 1e-5}, {"fraction": rate}
        owner, answer = joined(home, tmp_path / "node", privacy=privacy, limits=limits, sampling=sampling)
        assert isinstance(answer, HandshakeReply) and reason_of(trained(owner, 0)) is None
        owner.stop()
    assert [(one.noise_multiplier, one.rate, one.count) for one in releases()] == [
        (2.0, 0.5, 2),
        (1.0, 0.5, 2),
        (1.0, 1.0, 2),
    ]
    weak = {"unit": "client", "noise_multiplier": 0.1, "delta": 1e-5}
    _, answer = joined(home, tmp_path / "node", privacy=weak, limits=limits)
    assert isinstance(answer, Rejected) and answer.failure.reason is Reason.BUDGET
