"""The commands privacy and audit."""

import json

from commands import assert_refused

from fedlora.privacy.account import epsilon, version
from fedlora.privacy.events import Gaussian

NOISE = ("--set", "privacy.delta=1e-3", "--set", "privacy.noise_multiplier=1.0")
PRIVATE = (*NOISE, "--set", "evaluate.clients=none")
RECORD, CLIENT = ("--set", "privacy.unit=record", *PRIVATE), ("--set", "privacy.unit=client", *PRIVATE)


def test_without_privacy_the_command_says_how_to_add_it(place, command):
    assert_refused(
        command("privacy", place / "good.toml"), "good.toml", "[privacy]", "docs/privacy.md", "privacy.unit=record"
    )


def test_the_plan_of_clients_is_a_table_or_one_json_object(place, command):
    arguments = ("privacy", place / "good.toml", *CLIENT, "--set", "rounds=4")
    code, printed, errors = command(*arguments)
    expected = epsilon([Gaussian(1.0, count=4)], 1e-3)
    assert code == 0 and f"epsilon {expected:.4g} by PLD" in printed and version() in printed
    assert "privacy.delta = 0.001" not in errors  # 3 clients: at most 1 / 30
    found = json.loads(command(*arguments, "--json")[1])
    assert found["epsilon"] == expected and found["rounds"][-1] == {"round": 4, "epsilon": expected}
    assert found["units"] == 3 and found["unit"] == "client" and found["warnings"] == []


def test_the_plan_of_records_has_the_clients_of_the_data(place, command):
    arguments = ("privacy", place / "good.toml", *RECORD, "--set", "train.batch_size=1000", "--set", "rounds=2")
    found = json.loads(command(*arguments, "--json")[1])
    listed = command("check", place / "good.toml", "--set", "clients.held_out=0.0")[1]
    sizes = {
        line.split()[0]: int(line.split()[2])
        for line in listed.splitlines()
        if line.split()[:1] in (["000"], ["001"], ["002"])
    }
    assert {one["name"]: one["units"] for one in found["mechanisms"]} == sizes
    assert all((one["rate"], one["steps"]) == (1.0, 2) for one in found["mechanisms"])


def test_there_is_no_plan_of_what_the_guarantee_does_not_cover(place, command):
    arguments = ("privacy", place / "good.toml")
    assert_refused(command(*arguments, *RECORD, "--set", "method.name=ce-lora"), "features of its examples")
    assert_refused(command(*arguments, *RECORD, "--set", "train.clip_norm=1"), "train.clip_norm = 1")
    assert_refused(command(*arguments, *CLIENT, "--set", "method.name=local-only"), "nothing is uploaded")


def test_a_node_asks_for_its_own_number_of_examples(place, command):
    arguments = ("privacy", place / "good.toml", *RECORD, "--set", "data.source=none", "--examples", "300")
    code, printed, errors = command(*arguments, "--set", "train.batch_size=300")
    assert code == 0 and "n = 300" in printed
    assert "privacy.delta = 0.001 is above 1 / (10 n) = 3.3e-04" in errors
    refused = ("privacy", place / "good.toml", *CLIENT, "--examples", "300")
    assert_refused(command(*refused), "--examples: expected privacy.unit = 'record', found 'client'")
    assert_refused(command(*arguments[:-2]), "give one with --examples")


def test_no_noise_is_null_in_json_and_a_warning(place, command):
    arguments = ("privacy", place / "good.toml", *CLIENT, "--set", "privacy.noise_multiplier=0.0")
    found = json.loads(command(*arguments, "--json")[1])
    assert found["epsilon"] is None and found["warnings"] == ["privacy.noise_multiplier = 0 gives no guarantee"]


def test_an_audit_needs_guesses_and_text(place, command):
    for guesses in ("0", "11"):
        code, _, errors = command("audit", place / "good.toml", "--canaries", "20", "--guesses", guesses)
        assert code == 2 and errors
