"""Client-level differential privacy: what a round releases of its clients."""

import math
from collections import Counter
from dataclasses import replace
from statistics import fmean, variance

import pytest
import torch
from client_rounds import Seen, Spoiled, minus, norm, privacy, private_plan, private_rounds

from fedlora.config.experiment import Experiment
from fedlora.errors import UserError
from fedlora.messages import ClientInfo, Round
from fedlora.methods.table import TABLE
from fedlora.methods.wrap.fedprox import FedProx
from fedlora.methods.wrap.head import with_head
from fedlora.privacy.account import epsilon
from fedlora.privacy.audit import audit_mechanism
from fedlora.privacy.events import Gaussian
from fedlora.privacy.release import leaving
from fedlora.rounds.client_privacy import ClippedSum, Frame
from fedlora.rounds.codec import decode_state, encode_state
from fedlora.rounds.frame import common_frame
from fedlora.rounds.loop import run_rounds
from fedlora.rounds.plan import RecordLevel, RunState
from fedlora.rounds.row import PrivacyRow

from rows import untimed
from toy import MemoryStates, Quiet, ToyTrainer, toy_clients, toy_method, toy_simulation

SETTINGS = {
    "lora-a2": {"upload": "all"},
    "lora-a2, shared choice": {"shared_rank": 1},
    "flexlora": {"upload": "dense"},
    "fra-lora": {"upload": "dense"},
}
"""With which methods merge means of uploads without choices, where the default is another one."""


def allowed(name):
    privacy = {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-5}
    method = {"name": name.partition(",")[0], **SETTINGS.get(name, {})}
    experiment = Experiment(method=method, privacy=privacy, evaluate={"clients": "none"})
    try:
        return bool(leaving(experiment))
    except UserError:
        return False


ALLOWED = [name for name in TABLE if allowed(name)]
SHARED = "lora-a2, shared choice"


def method_with_trained_head(name):
    row = TABLE[name.partition(",")[0]]
    inner = row.make(**row.fixed_settings, rank=3, **SETTINGS.get(name, {}))
    return with_head(inner, "method-managed" if row.head == "method-managed" else "averaged")


def test_all_methods_that_merge_means_of_uploads_without_choices_are_allowed():
    uploads_nothing, chooses = {"local-only"}, {"flasc"}
    means = {n for n, row in TABLE.items() if row.make(**row.fixed_settings, **SETTINGS.get(n, {})).collects_mean}
    assert set(ALLOWED) == means - uploads_nothing - chooses
    assert allowed(SHARED)


@pytest.mark.parametrize("wrapper", [None, pytest.param(FedProx, marks=pytest.mark.slow)], ids=["alone", "fedprox"])
@pytest.mark.parametrize("name", [*ALLOWED, SHARED])
def test_the_released_sum_moves_by_at_most_the_clip_if_a_client_is_added(name, wrapper):
    """In a later round, with clients whose uploads are small, huge, rejected as too large, or absent."""
    method = method_with_trained_head(name)
    method = method if wrapper is None else wrapper(method)
    clients, level = toy_clients(5), privacy(clip=0.5, expected=4.0)
    later, _ = private_rounds(method, clients, privacy(noise=0.1), rounds=2)
    start = RunState(later.server)  # its base updates are not needed

    def released(some):
        seen = Seen(method)
        trainer = ToyTrainer()
        backend = Spoiled(toy_simulation(seen, trainer, some), {"1": 1e3, "2": 1e12}, failed=["3"])
        plan = private_plan(seen, trainer, level)
        _, row = next(run_rounds(plan, backend, MemoryStates(), start, 2, Quiet()))
        return seen.means[-1], row

    everybody, row = released(clients)
    assert set(row.accepted) == {"0", "1", "4"} and set(row.rejected) == {"2", "3"}
    for left_out in clients:
        others, _ = released([client for client in clients if client != left_out])
        change = norm(minus(everybody, others)) * level.expected_cohort
        assert change <= level.clip * (1 + 1e-4)
        assert (change > 0.9 * level.clip) if left_out.id == "1" else (change > 0) == (left_out.id in row.accepted)
        if left_out.id == "1":
            moved = {key for key, x in minus(everybody, others).items() if x.any()}
            assert any(key.startswith("head/") for key in moved) and not all(key.startswith("head/") for key in moved)


def test_without_noise_and_with_a_large_clip_the_mean_is_that_of_the_cohort():
    method, clients = method_with_trained_head("fedit"), [replace(one, examples=1) for one in toy_clients()]
    private, _ = private_rounds(method, clients, privacy(clip=1e6))
    plan = replace(private_plan(method, ToyTrainer(), privacy()), client_level=None)
    backend, start = toy_simulation(method, ToyTrainer(), clients), RunState(method.init_server(ToyTrainer().spec, 0))
    *_, (plain, _) = run_rounds(plan, backend, MemoryStates(), start, 0, Quiet())
    for name, part in private.server.inner.items():
        torch.testing.assert_close(part, plain.server.inner[name])


@pytest.mark.parametrize("secret", [False, True], ids=["seeded", "secret"])
def test_every_tensor_gets_noise_of_the_multiplier_times_the_clip(secret):
    method, level = method_with_trained_head("fedit"), privacy(clip=0.5, noise=3.0, rate=0.0, expected=2.0, secret=secret)
    server, trainer = method.init_server(ToyTrainer().spec, 0), ToyTrainer()
    drawn = {}
    for index in range(150):
        frame = common_frame(method, trainer.spec, server, Round(index, 0))
        released = level.release(ClippedSum(frame, level.clip), Round(index, 0)).mean.tensors()
        for name, x in minus(released, frame.template).items():
            drawn.setdefault(name, []).append(x.flatten())
    assert any(name.startswith("head/") for name in drawn)
    for found in map(torch.cat, drawn.values()):
        standard = found * level.expected_cohort / (3.0 * 0.5)
        few = 5 / len(standard) ** 0.5
        assert abs(float(standard.mean())) < few and abs(float(standard.square().mean()) - 1) < 1.5 * few
        assert abs(float((standard.abs() < 1).double().mean()) - math.erf(0.5**0.5)) < few


def test_numbers_of_owners_get_no_noise_as_no_upload_changes_them():
    seen = Seen(method_with_trained_head("ravan"))
    private_rounds(seen, toy_clients(), privacy(noise=1.0), rounds=1)
    counts = {name: x for name, x in seen.means[0].items() if name.endswith(".count")}
    assert counts and all(bool((x == 1).all()) for x in counts.values())


def test_a_round_without_clients_releases_noise_alone():
    method = method_with_trained_head("fedit")
    before = method.init_server(ToyTrainer().spec, 0)
    after, rows = private_rounds(method, toy_clients(), privacy(noise=1.0, rate=0.0), rounds=2)
    assert [(row.chosen, row.accepted, row.attempts, row.privacy.epsilon) for row in rows] == [
        ([], [], 1, 1.0),
        ([], [], 1, 2.0),
    ]
    assert not torch.equal(after.server.head["head.weight"], before.head["head.weight"])


def test_each_client_is_drawn_on_its_own():
    clients = [ClientInfo(f"{i:02}", 3, 1) for i in range(40)]
    level, counts, sizes = privacy(rate=0.25), Counter(), []
    for index in range(400):
        chosen = level.choose(clients, Round(index, 0))
        assert [one for one in level.choose(clients[1:], Round(index, 0))] == [one for one in chosen if one != clients[0]]
        counts.update(one.id for one in chosen)
        sizes.append(len(chosen))
    assert all(abs(count / 400 - 0.25) < 0.12 for count in counts.values()) and len(counts) == 40
    assert fmean(sizes) == pytest.approx(10, rel=0.05) and variance(sizes) == pytest.approx(7.5, rel=0.3)


def test_of_more_drawn_clients_than_the_largest_cohort_so_many_are_kept_at_random():
    clients = [ClientInfo(f"{i:02}", 3, 1) for i in range(40)]
    whole, counts, full = privacy(rate=0.25), Counter(), 0
    limited = replace(whole, largest=10, clients=40)
    for index in range(600):
        drawn, kept = (level.choose(clients, Round(index, 0)) for level in (whole, limited))
        assert kept == [one for one in drawn if one in kept] and len(kept) == min(10, len(drawn))
        if len(drawn) > 10:
            full += 1
            counts.update({one.id: (one in kept) - 10 / len(drawn) for one in drawn})
    assert 150 < full < 450
    assert all(abs(excess) < 4 * (full * 0.25 * 0.25) ** 0.5 for excess in counts.values()), "no client is preferred"


def test_a_client_less_changes_a_truncated_cohort_by_at_most_one_other_client():
    clients = [ClientInfo(f"{i:02}", 3, 1) for i in range(40)]
    level, replaced = privacy(rate=0.25, largest=8, clients=40), 0
    for index in range(40):
        cohort = set(level.choose(clients, Round(index, 0)))
        for left_out in cohort:
            others = set(level.choose([one for one in clients if one != left_out], Round(index, 0)))
            assert cohort - others == {left_out} and len(others - cohort) <= 1
            replaced += len(others - cohort)
    assert replaced > 100


def test_the_largest_cohort_holds_for_secret_draws_and_without_its_account_no_client_is_drawn():
    clients = [ClientInfo(f"{i:02}", 3, 1) for i in range(60)]
    level = privacy(rate=1.0, secret=True, largest=20, clients=30)
    draws = [level.choose(clients, Round(0, 0)) for _ in range(3)]
    assert all(len(drawn) == 20 and set(drawn) <= set(clients[:30]) for drawn in draws)
    assert draws[0] != draws[1] or draws[1] != draws[2]


def test_secret_cohorts_do_not_follow_from_the_seed():
    clients, level = [ClientInfo(f"{i:02}", 3, 1) for i in range(60)], privacy(rate=0.5, secret=True)
    assert level.choose(clients, Round(0, 0)) != level.choose(clients, Round(0, 0))


@pytest.mark.parametrize("start", [0.1, 5.0])
def test_an_adapted_clip_reaches_the_quantile_of_the_norms_from_both_sides(start):
    level = privacy(clip=start, noise=1.0, expected=100.0, quantile=0.5)
    frame, clip, rng = Frame({"x": torch.zeros(1)}), start, torch.Generator().manual_seed(0)
    for index in range(200):
        clipped = ClippedSum(frame, clip)
        for size in torch.randn(100, generator=rng).exp():
            clipped.add({"x": size[None]})
        clip = level.release(clipped, Round(index, 0)).next_clip
    assert clip == pytest.approx(1.0, rel=0.1)


def test_the_number_within_the_clip_is_paid_for_by_more_noise_on_the_sum():
    level = privacy(noise=1.0, expected=100.0, quantile=0.5)
    assert level.sum_noise == pytest.approx(1.005038, abs=1e-6)
    assert level.sum_noise**-2 + (2 * 5.0) ** -2 == pytest.approx(1.0)
    assert privacy(noise=1.0).sum_noise == 1.0


def test_a_cohort_that_is_too_small_for_the_quantile_is_rejected():
    with pytest.raises(ValueError, match=r"expected cohort above 10 clients .*, found 10"):
        privacy(noise=1.0, expected=10.0, quantile=0.5)


class Unclipped(ClippedSum):
    """A sum that forgets to clip."""

    def add(self, expanded):
        for name, x in expanded.items():
            self._sums[name].add_(x)


class Weighted(ClippedSum):
    """A sum in which each client counts ten times."""

    def add(self, expanded):
        for _ in range(10):
            super().add(expanded)


@pytest.mark.parametrize(
    ("kind", "noise", "broken"),
    [
        (ClippedSum, 5.0, False),
        (ClippedSum, 0.0, True),
        (ClippedSum, 0.5, True),
        (Unclipped, 5.0, True),
        (Weighted, 5.0, True),
    ],
    ids=["as claimed", "no noise", "too little noise", "no clip", "weights"],
)
def test_an_audit_finds_what_is_broken_and_nothing_else(kind, noise, broken):
    """The claim is a noise multiplier of 5."""
    shapes, level = {"q.b": (20, 15), "head/head.weight": (5, 20)}, privacy(clip=0.1, noise=noise, expected=1.0)

    def release(terms, seed):
        clipped = kind(Frame({name: torch.zeros(shape) for name, shape in shapes.items()}), level.clip)
        for term in terms:
            clipped.add(term)
        return level.release(clipped, Round(0, seed)).mean.tensors()

    bounds = [audit_mechanism(release, shapes, 300, 40, 10 * level.clip, 1e-5, seed).bound for seed in range(3)]
    assert (min(bounds) > epsilon([Gaussian(5.0)], 1e-5)) == broken


@pytest.mark.parametrize("name", ["fedit", SHARED])
def test_a_run_continued_from_its_saved_state_is_the_undisturbed_run(tmp_path, name):
    method = method_with_trained_head(name)
    level = privacy(noise=0.5, rate=0.5, expected=15.0, quantile=0.5, largest=15, clients=30)
    trainer, clients = ToyTrainer(), toy_clients(30)
    plan, start = private_plan(method, trainer, level, rounds=4), RunState(method.init_server(trainer.spec, 0))

    def rounds(state, first):
        return list(run_rounds(plan, toy_simulation(method, trainer, clients), MemoryStates(), state, first, Quiet()))

    whole = rounds(start, 0)
    (tmp_path / "state").write_bytes(encode_state(whole[1][0]))
    resumed = rounds(decode_state(str(tmp_path / "state"))[0], 2)
    assert [untimed(row) for _, row in resumed] == [untimed(row) for _, row in whole[2:]]
    assert encode_state(resumed[-1][0]) == encode_state(whole[-1][0])
    assert len({row.privacy.clip for _, row in whole}) == 4
    assert max(len(row.chosen) for _, row in whole) == 15


def test_rows_have_nothing_that_depends_on_single_uploads():
    _, rows = private_rounds(method_with_trained_head("fedit"), toy_clients(), privacy(clip=1e-3, noise=1.0))
    for row in rows:
        unwanted = (row.train_loss, row.largest_upload, row.clipped, row.aggregation_error, row.diverged, row.clients)
        assert unwanted == (None,) * 6
        assert all((one.loss, one.steps, one.weight) == (None, None, 1.0) for one in row.per_client.values())


def test_rows_of_private_records_have_each_clients_epsilon_and_the_largest():
    method, trainer, clients = method_with_trained_head("fedit"), ToyTrainer(), toy_clients()
    records = RecordLevel(0.5, 1e-5, lambda client, rounds: float(rounds * (1 + int(client.id))))
    plan = replace(private_plan(method, trainer, privacy()), client_level=None, record_level=records)
    start = RunState(method.init_server(trainer.spec, 0))
    for _, row in run_rounds(plan, toy_simulation(method, trainer, clients), MemoryStates(), start, 0, Quiet()):
        assert [row.per_client[name].epsilon for name in "0123"] == [row.round * spent for spent in (1.0, 2.0, 3.0, 4.0)]
        assert row.privacy == PrivacyRow(4.0 * row.round, 1e-5, 0.5)
        assert row.train_loss is None and row.largest_upload is not None  # of uploads that have noise


def test_what_clients_are_told_does_not_depend_on_who_takes_part():
    seen = []

    class Watching(Spoiled):
        def train_clients(self, rnd, sent, pending):
            seen.append(rnd)
            return super().train_clients(rnd, sent, pending)

    method, trainer, level = method_with_trained_head("fedit"), ToyTrainer(), privacy(rate=0.5, expected=2.0)
    backend = Watching(toy_simulation(method, trainer, toy_clients()))
    start = RunState(method.init_server(trainer.spec, 0))
    list(run_rounds(private_plan(method, trainer, level, 6), backend, MemoryStates(), start, 0, Quiet()))
    assert {rnd.expected_cohort for rnd in seen} == {2}
    assert {last.share for rnd in seen for last in rnd.acknowledged.values()} == {0.5}


def test_a_state_is_sent_to_clients_only_after_its_round_is_committed():
    method, trainer = method_with_trained_head("fedit"), ToyTrainer()
    start, seen = RunState(method.init_server(trainer.spec, 0)), {}
    for level in (privacy(), None):
        plan = replace(private_plan(method, trainer, privacy()), client_level=level)
        backend = Spoiled(toy_simulation(method, trainer, toy_clients()))
        asked = []
        backend.train_clients = lambda rnd, *given, inner=backend.inner, asked=asked: (
            asked.append(rnd.index),
            inner.train_clients(rnd, *given),
        )[1]
        next(run_rounds(plan, backend, MemoryStates(), start, 0, Quiet()))
        seen[level is None] = asked
    assert seen == {False: [0], True: [0, 1]}


def test_only_the_ranks_that_the_server_chose_get_noise():
    method = method_with_trained_head(SHARED)
    before = method.init_server(ToyTrainer().spec, 0)
    after, _ = private_rounds(method, toy_clients(), privacy(noise=1.0, rate=0.0), rounds=2)
    for name, part in after.server.inner.adapter.items():
        start = before.inner.adapter[name]
        assert [bool((new != old).any()) for new, old in zip(part.b.mT, start.b.mT, strict=True)] == [True, False, False]
        assert [bool((new != old).any()) for new, old in zip(part.a, start.a, strict=True)] == [True, False, False]


def test_without_noise_a_choice_of_all_ranks_is_an_upload_of_all():
    states = []
    for settings in ({"shared_rank": 3}, {"upload": "all"}):
        method = toy_method(TABLE["lora-a2"], rank=3, **settings)
        states.append(private_rounds(method, toy_clients(), privacy(clip=0.1), rounds=4)[0].server.inner.adapter)
    for name, part in states[0].items():
        torch.testing.assert_close((part.b, part.a), (states[1][name].b, states[1][name].a))


def test_ranks_that_a_client_did_not_choose_are_uploaded_as_zeros():
    states = {}
    for upload in ("chosen", "all"):
        method = toy_method(TABLE["lora-a2"], rank=3, upload=upload)
        plan = replace(private_plan(method, ToyTrainer(), privacy()), client_level=None)
        start = RunState(method.init_server(ToyTrainer().spec, 0))
        backend = toy_simulation(method, ToyTrainer(), toy_clients(rank=[1, 2, 3, 2]))
        *_, (states[upload], _) = run_rounds(plan, backend, MemoryStates(), start, 0, Quiet())
    assert encode_state(states["chosen"].server) == encode_state(states["all"].server)
