"""What a node's owner allows: the policy, the questions without one, and what is refused."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedlora.cli import deploy as command
from fedlora.cli.main import app
from fedlora.config.experiment import build
from fedlora.config.policy import STARTER, Policy, PrivacyLimits
from fedlora.deploy.policy import budgets, own_clip, own_noise, refusals
from fedlora.deploy.reasons import NodeFailure, Reason
from fedlora.deploy.settings import Settings
from fedlora.deploy.terms import agree, describe
from fedlora.errors import UserError

from wired import problem

RECORD = {"unit": "record", "noise_multiplier": 1.0, "delta": 1e-5}
LIMITS = {"unit": "record", "epsilon": 8.0, "run_epsilon": 2.0, "delta": 1e-6, "clip": 0.5}


def asked(**more):
    scores = {"evaluate": {"clients": "none"}} if more.get("privacy") else {}
    return build(problem(Path("home"), **scores, **more))


def written(folder, text):
    (folder / "policy.toml").write_text(text)
    return folder / "policy.toml"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('metods = ["fedit"]', "unknown key 'metods'; did you mean 'methods'?"),
        ("[privacy]\nclp = 1.0", "unknown key 'privacy.clp'; did you mean 'clip'?"),
        ('[privacy]\nunit = "recod"', "privacy.unit = 'recod': Input should be 'none', 'record' or 'client'"),
        ('tasks = ["classificaton"]', "tasks: 'classificaton' is not a task; did you mean 'classification'?"),
        ("rounds = 0", "rounds = 0: expected a whole number of at least 1"),
        ('[privacy]\nunit = "record"\nepsilon = -1.0\ndelta = 1e-5', "privacy.epsilon = -1.0: expected a finite number"),
        ('[privacy]\nunit = "record"', "privacy.unit = 'record' needs privacy.epsilon or privacy.run_epsilon, and"),
        ('[privacy]\nunit = "record"\nepsilon = 1.0', "and privacy.delta"),
        ('[privacy]\nunit = "client"\ndelta = 1e-5', "privacy.unit = 'client' needs privacy.epsilon or"),
        ("[privacy]\nepsilon = 1.0\ndelta = 1e-5", "needs privacy.unit = 'record' or 'client'"),
        ('[privacy]\nunit = "record"\nclip = 1e-9', "privacy.clip = 1e-09: expected a finite number of at least 1e-06"),
        ('[privacy]\nunit = "client"\nclip = 1.0', "privacy.clip needs privacy.unit = 'record'"),
        ("rounds = ", "not readable as TOML"),
    ],
)
def test_an_invalid_policy_is_rejected_with_its_file_and_key(tmp_path, text, reason):
    path = written(tmp_path, text)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: .*{re.escape(reason)}"):
        Policy.read(path)


def test_the_example_of_a_policy_is_valid_and_limits_everything_and_names_an_account(tmp_path):
    found = Policy.read(written(tmp_path, STARTER))
    omitted = {
        key
        for part in (found, found.privacy, found.traffic)
        for key in type(part).model_fields
        if key not in part.model_fields_set
    }
    assert omitted == {"ledger"}


def test_settings_with_a_policy_are_the_same_after_they_were_written(tmp_path):
    settings = Settings(clients=["c"], policy=Policy.read(written(tmp_path, STARTER)))
    for one in (settings, Settings(clients=["c"], policy=Policy())):
        one.write(tmp_path)
        assert Settings.read(tmp_path) == one


def test_a_ledger_is_in_a_folder_beside_the_policy_from_wherever_it_is_read(tmp_path, monkeypatch):
    path = written(tmp_path, '[privacy]\nledger = "accounts"')
    monkeypatch.chdir("/")
    assert Policy.read(path).privacy.ledger == str(tmp_path / "accounts")


def test_the_default_policy_allows_whatever_an_experiment_asks_for():
    for privacy in ({}, RECORD, {**RECORD, "public_counts": True}, {**RECORD, "unit": "client"}):
        assert list(refusals(Policy(), asked(privacy=privacy))) == []


WEAKER = {
    "another method": (Policy(methods=["ffa-lora"]), {}, Reason.METHOD),
    "another task": (Policy(tasks=["tagging"]), {}, Reason.TASK),
    "another model": (Policy(models=["package:x/y"]), {}, Reason.MODEL_NOT_ALLOWED),
    "another column": (Policy(columns=["label"]), {}, Reason.COLUMNS),
    "more rounds": (Policy(rounds=2), {"rounds": 3}, Reason.ROUNDS),
    "fewer uploads": (Policy(cohort=3), {"sampling": {"min_replies": 2}}, Reason.COHORT),
    "a smaller cohort of clients": (
        Policy(cohort=3),
        {"privacy": {**RECORD, "unit": "client"}, "sampling": {"fraction": 0.5}},
        Reason.COHORT,
    ),
    "single uploads": (Policy(secure="required"), {}, Reason.SECURE),
    "no privacy": (Policy(privacy=LIMITS), {}, Reason.UNIT),
    "another unit": (
        Policy(privacy=LIMITS),
        {"privacy": {**RECORD, "unit": "client"}},
        Reason.UNIT,
    ),
    "counts": (
        Policy(privacy=LIMITS),
        {"privacy": {**RECORD, "public_counts": True}},
        Reason.COUNTS,
    ),
}


@pytest.mark.parametrize("name", WEAKER)
def test_an_experiment_that_is_weaker_than_the_policy_is_refused_with_its_code(name):
    policy, more, reason = WEAKER[name]
    assert [refusal.reason for refusal in refusals(policy, asked(**more))] == [reason]


def test_an_experiment_within_the_policy_is_not_refused():
    policy = Policy(
        methods=["fedit"], tasks=["classification"], columns=["text", "label"], rounds=3, cohort=2, privacy=LIMITS
    )
    assert list(refusals(policy, asked(privacy=RECORD, sampling={"min_replies": 2}))) == []


def noise_for(epsilon, delta, rate, steps):
    """A simple account of the card's kind: noise grows with rate and steps, and falls with epsilon."""
    return rate * steps**0.5 / epsilon


@pytest.mark.parametrize(
    ("clip", "noise", "rate", "steps"),
    [(1e9, 0.0, 0.1, 100), (1.0, 1e-9, 1.0, 100), (1.0, 0.5, 1.0, 10**6), (0.1, 1e3, 0.1, 1)],
)
def test_a_node_trains_with_at_least_its_policys_noise_and_at_most_its_clip_whatever_the_server_asks_for(
    clip, noise, rate, steps
):
    limits = PrivacyLimits(**LIMITS)
    assert own_clip(clip, limits) == min(clip, 0.5)
    found = own_noise(noise, rate, steps, limits, noise_for)
    assert found >= noise and found >= noise_for(2.0, 1e-6, rate, steps)
    assert own_noise(noise, rate, steps, PrivacyLimits(), noise_for) == noise
    assert [(b.of, b.epsilon, b.delta) for b in budgets(limits)] == [("one run", 2.0, 1e-6), ("all runs", 8.0, 1e-6)]


def test_without_a_policy_the_owner_is_asked_once_and_again_only_if_the_server_asks_for_more(tmp_path):
    questions, told = [], []

    def confirm(question):
        questions.append(question)
        return True

    settings = Settings(clients=["c"])
    for rounds in (3, 3, 4):
        agree(asked(rounds=rounds), settings, tmp_path, told.append, confirm)
    assert len(questions) == 2
    for word in (
        "in a round, in batches of",
        "fedit, rank 2",
        "classification, on the columns text, label",
        "rounds      3",
        "number of examples",
    ):
        assert any(word in line for line in told)
    agree(asked(rounds=4), settings, tmp_path, told.append, None)  # remembered also without a terminal


@pytest.mark.parametrize(
    "unit, more, words",
    [
        ("client", {"clip_quantile": 0.4}, "clip 0.5, adapted to the quantile 0.4 of the norms"),
        ("client", {"largest_cohort": 30}, "at most 30 clients in a round"),
        ("record", {"participations": 2}, "at most 2 rounds of a client"),
        ("record", {"public_counts": True}, "numbers of examples are public"),
    ],
)
def test_the_owner_is_told_all_limits_of_privacy(unit, more, words):
    private = {"unit": unit, "noise_multiplier": 1.0, "delta": 1e-5, "clip": 0.5}
    plain, full = (describe(asked(privacy=one), True) for one in (private, private | more))
    assert any(words in line for line in full) and not any(words in line for line in plain)


STRONGER = {
    "more steps": {"train": {"max_steps": 10**6}},
    "larger batches": {"train": {"batch_size": 10**6}},
    "a larger learning rate": {"train": {"lr": 10.0}},
    "more rounds of a client": {"privacy": {**RECORD, "participations": 3}},
    "less noise": {"privacy": {**RECORD, "noise_multiplier": 0.1}},
    "larger cohorts": {"sampling": {"fraction": 1.0}},
}


@pytest.mark.parametrize("name", STRONGER)
def test_an_answer_is_not_valid_for_other_settings_of_the_same_run(tmp_path, name):
    settings, base = Settings(clients=["c"]), {"privacy": RECORD, "sampling": {"fraction": 0.5}}
    agree(asked(**base), settings, tmp_path, lambda line: None, lambda question: True)
    with pytest.raises(NodeFailure):
        agree(asked(**{**base, **STRONGER[name]}), settings, tmp_path, lambda line: None, None)


def test_an_answer_stays_valid_when_the_server_waits_longer(tmp_path):
    settings = Settings(clients=["c"])
    agree(asked(), settings, tmp_path, lambda line: None, lambda question: True)
    told: list[str] = []
    agree(asked(deploy={"wait": 1.0, "deadline": 7200.0}), settings, tmp_path, told.append, None)
    assert told == []


@pytest.mark.parametrize("confirm", [None, lambda question: False])
def test_a_run_that_nobody_accepts_is_refused_with_the_way_out(tmp_path, confirm):
    told = []
    with pytest.raises(NodeFailure) as failed:
        agree(asked(), Settings(clients=["c"]), tmp_path, told.append, confirm)
    assert failed.value.reason is Reason.TERMS and "--policy FILE" in told[-1] and "--accept" in told[-1]
    assert list(tmp_path.iterdir()) == []


def test_with_a_policy_or_a_flag_nobody_is_asked(tmp_path):
    told = []
    for more in ({"accept": True}, {"policy": Policy()}):
        agree(asked(), Settings(clients=["c"], **more), tmp_path, told.append, None)
    assert told == []


def test_a_run_with_privacy_says_before_it_begins_that_counts_and_scores_are_not_sent(tmp_path):
    told = []
    agree(asked(privacy=RECORD), Settings(clients=["c"]), tmp_path, told.append, lambda question: True)
    text = "\n".join(told)
    assert "values of the upload (a, b, head): covered: DP-SGD" in text and "weight: fixed: 1, for each client" in text
    assert not any(word in text for word in ("training loss", "scores"))


def test_join_without_a_terminal_needs_a_policy_or_the_flag(tmp_path, monkeypatch):
    monkeypatch.setattr(command.os, "umask", lambda mask: 0)  # of this process, which goes on
    join = ["join", "--server", "127.0.0.1:1", "--client", "c", "--folder", str(tmp_path / "node")]
    failed = CliRunner().invoke(app, join)
    assert isinstance(failed.exception, UserError) and "--policy FILE" in str(failed.exception)
    both = CliRunner().invoke(app, [*join, "--accept", "--policy", str(written(tmp_path, "rounds = 3"))])
    assert isinstance(both.exception, UserError) and "exclude each other" in str(both.exception)
    assert not (tmp_path / "node").exists()


def test_join_writes_an_example_of_a_policy_and_nothing_else(tmp_path):
    done = CliRunner().invoke(app, ["join", "--write-policy", str(tmp_path / "policy.toml")])
    assert done.exit_code == 0 and (tmp_path / "policy.toml").read_text() == STARTER
    again = CliRunner().invoke(app, ["join", "--write-policy", str(tmp_path / "policy.toml")])
    assert isinstance(again.exception, UserError) and "already exists" in str(again.exception)
