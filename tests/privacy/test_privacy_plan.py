"""Plans of runs, the statement about them, and the command that prints them."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from fedlora import Experiment
from fedlora.config.privacy import Privacy
from fedlora.messages import ClientInfo
from fedlora.methods.lora_a2 import LoRAA2
from fedlora.planning import plan_of, statement_of, statement_text, weakness_notes
from fedlora.privacy.account import epsilon, noise_for
from fedlora.privacy.events import Gaussian, Truncation
from fedlora.privacy.plan import client_plan, record_plan
from fedlora.privacy.statement import Statement
from fedlora.report import privacy_tables

RECORDS = Privacy(unit="record", noise_multiplier=1.0, delta=1e-4)
CLIENTS = Privacy(unit="client", noise_multiplier=1.0, delta=1e-3, clip=0.5)


def steps(examples):
    return -(-examples // 8)


def test_a_client_has_its_own_rate_steps_and_epsilon():
    plan = record_plan(RECORDS, 3, 8, {"a": 5, "b": 80}, steps)
    small, large = plan.mechanisms
    assert (small.name, small.units, small.rate, small.steps, small.expected) == ("a", 5, 1.0, 3, 5.0)
    assert (large.name, large.units, large.rate, large.steps, large.expected) == ("b", 80, 0.1, 30, 8.0)
    for one in plan.mechanisms:
        assert one.epsilon(1e-4) == epsilon([Gaussian(1.0, one.rate, one.steps)], 1e-4)
    assert plan.worst() is small and plan.units == 80 and plan.largest_delta == pytest.approx(1 / 800)


def test_participations_bound_the_steps():
    privacy = RECORDS.model_copy(update={"participations": 2})
    (one,) = record_plan(privacy, 10, 8, {"a": 16}, steps).mechanisms
    assert one.steps == 4


def test_a_target_is_met_by_all_clients_with_noise_of_their_own():
    privacy = Privacy(unit="record", epsilon=2.0, delta=1e-4)
    plan = record_plan(privacy, 1, 8, {"a": 5, "b": 80}, steps)
    assert [one.noise_multiplier for one in plan.mechanisms] == [
        noise_for(2.0, 1e-4, 1.0, 1),
        noise_for(2.0, 1e-4, 0.1, 10),
    ]
    assert all(1.9 < one.epsilon(1e-4) <= 2.0 for one in plan.mechanisms)


def plan_of_one(examples):
    privacy = RECORDS.model_copy(update={"noise_multiplier": 50.0})
    return record_plan(privacy, 1, 8, {"a": examples}, steps).worst()


def test_of_many_clients_those_at_the_quantiles_and_the_most_used_are_shown():
    privacy = RECORDS.model_copy(update={"noise_multiplier": 50.0})
    sizes = {f"{i:03}": i for i in range(8, 108)}  # with 9 examples, two batches of 8 take nearly all twice
    plan = record_plan(privacy, 1, 8, sizes, steps)
    assert [one.units for one in plan.mechanisms] == [8, 9, 33, 58, 82, 107]
    used = max(sizes.values(), key=lambda n: plan_of_one(n).epsilon(1e-4) if n in (8, 9, 16, 17, 107) else 0.0)
    assert plan.worst().units == used == 9


def test_rounds_of_clients_are_the_steps_of_one_mechanism():
    plan = client_plan(CLIENTS, 50, 1.0, 40)
    (one,) = plan.mechanisms
    assert (one.units, one.rate, one.steps, one.expected) == (40, 1.0, 50, 40.0)
    by_round = plan.by_round()
    assert by_round[50] == one.epsilon(1e-3) and by_round[5] == epsilon([Gaussian(1.0, count=5)], 1e-3)
    assert list(by_round) == sorted(by_round) and list(by_round.values()) == sorted(by_round.values())


def test_a_largest_cohort_is_in_the_account_the_tables_and_the_statement():
    privacy = CLIENTS.model_copy(update={"largest_cohort": 12})
    plan = client_plan(privacy, 5, 0.1, 100)
    limited = [Gaussian(1.0, 0.1, 5, Truncation(12, 100))]
    (one,) = plan.mechanisms
    assert list(one.releases()) == limited
    assert (
        plan.by_round()[5] == one.epsilon(1e-3) == epsilon(limited, 1e-3) > client_plan(CLIENTS, 5, 0.1, 100).by_round()[5]
    )
    found = json.loads(privacy_tables.to_json(plan))
    assert (found["epsilon"], found["epsilon_rdp"], found["mechanisms"][0]["largest"]) == (epsilon(limited, 1e-3), None, 12)
    console = Console(width=120, file=io.StringIO())
    console.print(privacy_tables.table(plan))
    printed = console.file.getvalue()
    assert "largest" in printed and f"epsilon {epsilon(limited, 1e-3):.4g} by PLD, - by RDP" in printed
    text = Statement(plan, "seed", one.releases(2)).text()
    assert "expected cohort 10, of which at most 12, chosen at random, take part" in text
    assert f"epsilon by PLD {epsilon([Gaussian(1.0, 0.1, 2, Truncation(12, 100))], 1e-3):.4g}, by RDP -," in text


def test_the_page_about_privacy_has_the_costs_of_largest_cohorts():
    page = " ".join((Path(__file__).parents[2] / "docs" / "privacy.md").read_text(encoding="utf-8").split())
    sentence = page.partition("epsilon is ")[2].partition("the smallest limit")[0]
    without, *limited = re.findall(r"(\d\.\d+) (?:without a limit|with at most (\d+))", sentence)
    assert len(limited) == 3
    for shown, most in (without, *limited):
        privacy = CLIENTS.model_copy(update={"largest_cohort": int(most) if most else None})
        assert client_plan(privacy, 200, 0.02, 1000).worst().epsilon(1e-3) == pytest.approx(float(shown), abs=0.006)


def test_a_largest_cohort_that_no_cohort_can_exceed_changes_nothing():
    privacy = CLIENTS.model_copy(update={"largest_cohort": 40})
    assert client_plan(privacy, 50, 1.0, 40).by_round() == client_plan(CLIENTS, 50, 1.0, 40).by_round()


def test_the_noise_for_a_target_is_that_of_the_largest_cohort():
    privacy = Privacy(unit="client", epsilon=2.0, delta=1e-3, largest_cohort=12)
    (one,) = client_plan(privacy, 5, 0.1, 100).mechanisms
    assert one.noise_multiplier == noise_for(2.0, 1e-3, 0.1, 5, Truncation(12, 100)) and 1.98 < one.epsilon(1e-3) <= 2.0


def test_the_plan_of_an_experiment_has_its_batches_and_its_epochs():
    privacy = RECORDS.model_dump(exclude_defaults=True)
    training = {"train": {"batch_size": 4, "epochs": 2}, "evaluate": {"clients": "none"}}
    experiment = Experiment.model_validate({"rounds": 3, "privacy": privacy, **training})
    (one,) = plan_of(experiment, {"a": 10}).mechanisms
    assert (one.rate, one.steps) == (0.4, 3 * 2 * 3)
    probing = Experiment.model_validate(
        {"rounds": 3, "privacy": privacy, "method": {"name": "lora-a2"}, "clients": {"ranks": "uniform"}, **training}
    )
    (more,) = plan_of(probing, {"a": 10}).mechanisms
    assert more.steps == 3 * (LoRAA2(8).probe_epochs + 2) * 3, "all trainings that the method requests count"
    assert plan_of(Experiment(), {"a": 10}) is None and plan_of(experiment, {}) is None


def test_a_statement_says_what_is_protected_how_and_what_is_not():
    text = Statement(record_plan(RECORDS, 3, 8, {"a": 5, "b": 80}, steps), "seed").text()
    for part in (
        "Differential privacy for each example of a client",
        "one example of a client is added or removed, their number being public",
        "against the server",
        "Not protected are several examples of one person",
        "L2 norm 1; Gaussian noise of 1 times this norm",
        "Poisson with rate 0.1 to 1",
        "expected batch 5 to 8; at most 30 steps of a client planned.",
        "dp-accounting",
        f"epsilon by PLD {epsilon([Gaussian(1.0, 1.0, 3)], 1e-4):.4g}, by RDP",
        "delta = 0.0001 and n = 80 training examples of the largest client",
        "simulation, no guarantee",
    ):
        assert part in text
    assert "above 1 / (10 n)" not in text and "\n" not in text


def test_a_statement_says_whether_the_numbers_of_examples_are_sent_and_counts_one_step_as_one():
    public = RECORDS.model_copy(update={"public_counts": True})
    for privacy, part in ((RECORDS, "(which are not sent)"), (public, "(which are sent)")):
        text = Statement(record_plan(privacy, 1, 8, {"a": 5}, steps), "seed").text()
        assert f"their numbers of examples {part}," in text and "at most 1 step of a client planned" in text
    assert "; 1 round planned." in Statement(client_plan(CLIENTS, 1, 1.0, 40), "seed").text()
    assert "numbers of examples" not in Statement(client_plan(CLIENTS, 1, 1.0, 40), "seed").text()


def test_a_statement_has_what_was_spent_other_releases_and_the_audit():
    plan = client_plan(CLIENTS.model_copy(update={"clip_quantile": 0.5}), 50, 1.0, 400)
    spent = [Gaussian(1.0, count=7), Gaussian(20.0, count=2)]
    text = Statement(plan, "os", spent, ("2 evaluations",), "lower bound 0.3").text()
    for part in (
        f"epsilon = {epsilon(spent, 1e-3):.4g} and delta = 0.001",
        "the server sees the uploads, and is trusted",
        "L2 norm 0.5 at first, then adapted by noisy counts to the quantile 0.5",
        "expected cohort 400; 50 rounds planned",
        "The account includes 2 evaluations.",
        "Audit: lower bound 0.3.",
        "n = 400 clients, which is above 1 / (10 n) = 0.0003",
        "from the operating system",
    ):
        assert part in text
    assert "no guarantee" not in text


def test_a_statement_without_noise_promises_nothing():
    plan = client_plan(CLIENTS.model_copy(update={"noise_multiplier": 0.0}), 5, 1.0, 10)
    text = Statement(plan, "seed").text()
    assert text.startswith("Without noise, there is no guarantee") and "Differential privacy for" not in text


def test_the_statement_of_a_simulation_counts_its_rounds():
    privacy = CLIENTS.model_dump(exclude_defaults=True)
    sections = {"rounds": 9, "evaluate": {"clients": "none"}}
    experiment = Experiment.model_validate({"privacy": privacy, **sections})
    sizes = {str(i): 1 for i in range(10)}
    assert statement_of(experiment, sizes, 4, "seed").epsilon() == epsilon([Gaussian(1.0, count=4)], 1e-3)
    limited = {"privacy": {**privacy, "largest_cohort": 6}, "sampling": {"fraction": 0.5}, **sections}
    spent = statement_of(Experiment.model_validate(limited), sizes, 4, "seed").epsilon()
    assert spent == epsilon([Gaussian(1.0, 0.5, 4, Truncation(6, 10))], 1e-3)
    assert statement_of(Experiment(), sizes, 4, "seed") is None


def private(unit, noise, method="fedit", delta=1e-3):
    privacy = {"unit": unit, "noise_multiplier": noise, "delta": delta}
    sections = {"method": {"name": method}, "evaluate": {"clients": "none"}, "privacy": privacy}
    return Experiment.model_validate({"rounds": 4, **sections})


def test_no_statement_promises_what_a_run_without_noise_or_a_clients_own_adapter_lacks():
    clients = [ClientInfo(str(i), 8, 20) for i in range(3)]
    without = statement_text(private("record", 0.0), clients, 4)
    assert without.startswith("Without noise, there is no guarantee") and "Protected is" not in without
    assert "does not cover it" in statement_text(private("client", 1.0, "fedsa-lora"), clients, 4)
    assert statement_text(Experiment(), clients, 4) is None


def test_the_statement_of_a_deployment_does_not_speak_of_a_simulation():
    of_clients = statement_text(private("client", 1.0), [], 4, registered=30, deployed=True)
    assert "n = 30 clients" in of_clients and "operating system" in of_clients and "simulation" not in of_clients
    of_records = statement_text(private("record", 1.0), [], 4, registered=30, deployed=True)
    assert "in the ledger of each node" in of_records and "epsilon =" not in of_records
    assert statement_text(private("record", 0.0), [], 4, 30, True).startswith("The server asked for training without noise")
    assert "numbers of examples are sent" not in of_records
    public = private("record", 1.0)
    public = public.model_copy(update={"privacy": public.privacy.model_copy(update={"public_counts": True})})
    assert "numbers of examples are sent" in statement_text(public, [], 4, 30, True)


def test_a_delta_above_a_tenth_of_one_over_n_is_named():
    sizes = {"a": 50, "b": 100}
    assert weakness_notes(private("record", 1.0, delta=1e-3), sizes) == []
    assert "n = 100 training examples" in weakness_notes(private("record", 1.0, delta=2e-3), sizes)[0]
    (weak,) = weakness_notes(private("client", 1.0, delta=0.5), sizes)
    assert "n = 2 clients" in weak and "publishes one of them" in weak
    assert weakness_notes(Experiment(), sizes) == []
    assert weakness_notes(private("record", 0.0), sizes) == ["privacy.noise_multiplier = 0 gives no guarantee"]
