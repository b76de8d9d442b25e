"""The account of the privacy that a node's data have spent, on its disk."""

import math
import os
import stat
import subprocess
import sys

import pytest

from fedlora.config.policy import PrivacyLimits
from fedlora.deploy import run_privacy
from fedlora.deploy.policy import budgets, own_noise
from fedlora.deploy.privacy_ledger import Budget, BudgetSpent, LedgerDamaged, PrivacyLedger, Release, data_digest
from fedlora.errors import RunStopped
from fedlora.privacy import account
from fedlora.rounds import durable


def epsilon(releases, delta):
    """A simple account: without sampling, squares of 1 / noise add up."""
    return math.sqrt(sum(r.count / r.noise_multiplier**2 for r in releases)) * math.log(1 / delta)


def release(count=4, run="r", **more):
    table = {"client": "c", "unit": "record", "noise_multiplier": 2.0, "rate": 0.5, **more}
    return Release(run=run, count=count, **table)


def ledger(folder, data="d"):
    return PrivacyLedger(folder, data, epsilon)


def budget(count, of="all runs"):
    """A budget for so many of the releases."""
    return [Budget(of, epsilon([release(count)], 1e-5), 1e-5)]


def test_a_release_is_on_the_disk_before_it_is_made_and_counts_as_spent_until_it_is_settled(tmp_path):
    places = ledger(tmp_path).reserve([release(10)], [])
    assert [(r.count, r.settled) for r in ledger(tmp_path).releases()] == [(10, False)]
    ledger(tmp_path).settle(places, [7])
    assert [(r.count, r.settled) for r in ledger(tmp_path).releases()] == [(7, True)]


def test_budgets_hold_across_runs_and_refuse_the_first_release_beyond_them(tmp_path):
    for run in ("one", "two"):
        ledger(tmp_path).reserve([release(4, run)], budget(8))
    with pytest.raises(BudgetSpent, match=r"budget of all runs is epsilon .* at delta 1e-05"):
        ledger(tmp_path).reserve([release(1, "three")], budget(8))
    assert sum(r.count for r in ledger(tmp_path).releases()) == 8


def test_the_budget_of_one_run_does_not_count_other_runs(tmp_path):
    ledger(tmp_path).reserve([release(4, "one")], budget(4, "one run"))
    ledger(tmp_path).reserve([release(4, "two")], budget(4, "one run"))
    with pytest.raises(BudgetSpent, match="budget of one run"):
        ledger(tmp_path).reserve([release(1, "one")], budget(4, "one run"))


def test_of_several_releases_all_or_none_are_added(tmp_path):
    with pytest.raises(BudgetSpent):
        ledger(tmp_path).reserve([release(4), release(4, client="other")], budget(7))
    assert ledger(tmp_path).releases() == []


def test_the_two_units_are_two_accounts(tmp_path):
    ledger(tmp_path).reserve([release(4)], budget(4))
    ledger(tmp_path).reserve([release(4, unit="client")], budget(4))
    with pytest.raises(BudgetSpent):
        ledger(tmp_path).reserve([release(1, unit="client")], budget(4))


def test_other_data_have_another_account(tmp_path):
    ledger(tmp_path).reserve([release(4)], budget(4))
    ledger(tmp_path, "other").reserve([release(4)], budget(4))
    assert [len(ledger(tmp_path, *name).releases()) for name in ((), ("other",))] == [1, 1]


@pytest.mark.parametrize("damage", ["a byte", "cut", "empty", "of other data", "a lower count"])
def test_a_damaged_ledger_is_refused_and_stays_as_it_is(tmp_path, damage):
    found = ledger(tmp_path)
    found.reserve([release(12)], [])
    content = found.path.read_bytes()
    ledger(tmp_path, "other").reserve([release(12)], [])
    other = ledger(tmp_path, "other").path.read_bytes()
    changed = {
        "a byte": content[:-3] + b" " + content[-2:],
        "cut": content[: len(content) // 2],
        "empty": b"",
        "of other data": other,
        "a lower count": content.replace(b"12", b"11"),
    }[damage]
    found.path.write_bytes(changed)
    with pytest.raises(LedgerDamaged, match=r"d\.json: the privacy ledger is damaged"):
        found.reserve([release(1)], [])
    assert found.path.read_bytes() == changed


def test_a_ledger_that_cannot_be_written_allows_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise RunStopped("cannot write: No space left on device")

    monkeypatch.setattr(durable, "replace", full)
    with pytest.raises(RunStopped):
        ledger(tmp_path).reserve([release()], [])


def test_a_ledger_replaced_by_an_older_one_during_a_training_is_noticed(tmp_path):
    found = ledger(tmp_path)
    places = found.reserve([release()], [])
    found.path.unlink()
    with pytest.raises(LedgerDamaged, match="replaced"):
        found.settle(places, [4])


def test_a_ledger_is_readable_by_its_owner_only(tmp_path):
    before = os.umask(0)
    try:
        ledger(tmp_path / "new").reserve([release()], [])
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "new").iterdir()} == {0o600}


ADDING = """
import sys
from pathlib import Path
from fedlora.config.policy import PrivacyLimits
from fedlora.deploy import run_privacy
from fedlora.deploy.policy import budgets, own_noise
from fedlora.deploy.privacy_ledger import PrivacyLedger, Release
ledger = PrivacyLedger(Path(sys.argv[1]), "d", None)
for i in range(10):
    release = Release(run=sys.argv[2], client="c", unit="record", noise_multiplier=1.0, rate=1.0, count=1)
    ledger.settle(ledger.reserve([release], []), [1])
"""


@pytest.mark.slow
def test_two_processes_do_not_lose_releases(tmp_path):
    command = [sys.executable, "-c", ADDING, str(tmp_path)]
    processes = [subprocess.Popen([*command, run]) for run in ("one", "two")]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert sum(r.count for r in ledger(tmp_path).releases()) == 20


def test_data_are_identified_by_their_bytes_or_by_a_name_that_several_versions_share(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("a"), new.write_text("b")
    assert data_digest(None, old, "") != data_digest(None, new, "")
    assert data_digest("patients", old, "") == data_digest("patients", new, "")
    old.rename(tmp_path / "moved")
    assert data_digest(None, tmp_path / "moved", "") != data_digest(None, None, "a")


def test_a_folder_is_the_same_source_by_whatever_path(tmp_path, monkeypatch):
    (tmp_path / "rows").mkdir()
    monkeypatch.chdir(tmp_path)
    assert data_digest(None, None, "rows") == data_digest(None, None, str(tmp_path / "rows"))
    assert data_digest(None, None, "rows") != data_digest(None, None, "owner/rows")


@pytest.mark.slow
def test_the_noise_of_a_limit_lasts_for_all_promised_steps_and_not_for_many_more(tmp_path):
    limits = PrivacyLimits(unit="record", epsilon=2.0, delta=1e-5)
    noise = own_noise(0.0, 0.1, 30, limits, account.noise_for)
    found = PrivacyLedger(tmp_path, "d", run_privacy.composed)
    one_round = release(10, noise_multiplier=noise, rate=0.1)
    for _ in range(3):
        found.settle(found.reserve([one_round], budgets(limits)), [10])
    with pytest.raises(BudgetSpent):
        found.reserve([one_round], budgets(limits))
