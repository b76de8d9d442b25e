# ruff: noqa: F811  (a fixture)
"""Steps of DP-SGD on a tiny BERT with dropout, against plain twins."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from batched_jobs import TASK, jobs, routed, session, unfactored, whole  # noqa: F401  (a fixture)
from fedlora.adapter import Tensors, pack, pick
from fedlora.config.sections import Train
from fedlora.errors import UserError
from fedlora.messages import ClientInfo, FitRequest, Gradient, Round, Trained
from fedlora.models.dropout import ClientDropout
from fedlora.tasks.classification import Classification
from fedlora.train import private_gradients
from fedlora.train.batched import train_together
from fedlora.train.job import Job
from fedlora.train.local import LocalTrainer
from fedlora.train.record_privacy import RecordPrivacy

SGD = Train(optimizer="sgd", lr=1.0, batch_size=4, max_steps=3)
ONE = SGD.model_copy(update={"max_steps": 1})
EVERY = RecordPrivacy(clip=1e6, noise_multiplier=0.0, rate=1.0, steps=100)
SOME = RecordPrivacy(clip=0.3, noise_multiplier=0.5, rate=0.4, steps=100)


@pytest.fixture
def no_dropout(monkeypatch):
    monkeypatch.setattr(ClientDropout, "_dropout", lambda self, x, *_, **__: x)


def private(some: list[Job], privacy: RecordPrivacy) -> list[Job]:
    return [replace(job, privacy=privacy) for job in some]


def moved(job: Job, trained: Trained) -> dict[str, Tensor]:
    """How far each trained tensor has moved against its gradient, in PEFT's unit; b has alpha / rank = 16 / rank."""
    before, after, scale = pack(job.request.start), pack(trained.adapter), {"b": 16 / rank_of(job)}
    return {key: (x - after[key]) / scale.get(key.rpartition(".")[2], 1) for key, x in before.items()}


def rank_of(job: Job) -> int:
    return next(part.rank for part in job.request.start.values() if not part.in_head)


KINDS = {
    "factors": lambda job, i: job,
    "experts": lambda job, i: routed(job, 2, i),
    "weights": lambda job, i: unfactored(job),
}


def penalty(adapted: Any, client: int) -> Any:
    def of_b(live: Tensors) -> Tensor:
        return torch.stack([x.square().sum() for x in pick(live, "b").values()]).sum() / 10

    return (of_b,)


def correction(adapted: Any, client: int) -> dict[str, Tensor]:
    name = next(iter(adapted.spec.modules))
    return {f"{name}.b": torch.full((adapted.spec.modules[name][0], (2, 4, 1, 4)[client]), 0.01)}


def mask(adapted: Any, client: int) -> dict[str, Tensor]:
    name = next(iter(adapted.spec.modules))
    return {f"{name}.b": torch.arange((2, 4, 1, 4)[client])[None] < 1}


@pytest.mark.parametrize("packed", [True, False])
def test_without_clip_noise_and_sampling_it_is_training_on_all_examples(session, no_dropout, monkeypatch, packed):
    """Weight decay, penalties, corrections, masks and schedules apply as without privacy; ranks are unequal."""
    adapted, examples = session
    monkeypatch.setattr(adapted.packing, "works", packed)
    some = jobs(adapted, penalties=penalty, correction=correction, mask=mask)
    settings = Train(batch_size=64, lr=1e-2, weight_decay=0.1, schedule="linear", epochs=3, reduction="example")
    plain = train_together(adapted, TASK, examples, some, settings, 100_000)
    found = train_together(adapted, TASK, examples, private(some, EVERY), settings, 300)
    for one, other in zip(found, plain, strict=True):
        assert one.steps == other.steps == 3 and math.isnan(one.loss)
        assert_close(pack(one.adapter), pack(other.adapter), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_descends_the_sum_of_each_examples_clipped_gradient(session, no_dropout, kind):
    """The oracle trains on each example alone, and clips its step."""
    adapted, examples = session
    some = [KINDS[kind](job, i) for i, job in enumerate(jobs(adapted)[:3])]
    privacy = replace(EVERY, clip=0.2)
    found = train_together(adapted, TASK, examples, private(some, privacy), ONE, 1000)
    for job, one in zip(some, found, strict=True):
        expected: dict[str, Tensor] = {}
        for row in job.rows:
            alone = replace(job, rows=row[None])
            own = moved(alone, train_together(adapted, TASK, examples, [alone], ONE, 1000)[0])
            norm = torch.cat([x.flatten() for x in own.values()]).norm()
            assert norm > privacy.clip
            for key, x in own.items():
                expected[key] = expected.get(key, 0) + x * privacy.clip / (norm + 1e-6) / len(job.rows)
        assert_close(moved(job, one), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["factors", "weights"])
def test_clients_train_the_same_alone_and_together_in_passes_of_any_size(session, monkeypatch, kind):
    """With dropout, noise, samples that may be empty, unequal ranks, and masks; also without packing."""
    adapted, examples = session
    found = jobs(adapted, penalties=penalty, mask=mask) if kind == "factors" else map(unfactored, jobs(adapted))
    some = private(list(found), replace(SOME, rate=0.15))
    settings = SGD.model_copy(update={"lr": 0.1, "max_steps": 4})
    together = train_together(adapted, TASK, examples, some, settings, 100_000)
    small = train_together(adapted, TASK, examples, some, settings, 1)
    monkeypatch.setattr(adapted.packing, "works", False)
    alone = [train_together(adapted, TASK, examples, [job], settings, 40)[0] for job in some]
    for found in (small, alone):
        for one, other in zip(found, together, strict=True):
            assert_close(pack(one.adapter), pack(other.adapter), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("kind", ["factors", "weights"])
def test_one_more_example_changes_the_sum_by_at_most_the_clip(session, kind):
    """All tensors together, with the head; with dropout, and with a loss that is huge for the example."""
    adapted, examples = session
    job = replace(KINDS[kind](jobs(adapted)[0], 0), privacy=replace(EVERY, clip=0.1))

    class Huge(Classification):
        def losses(self, model: nn.Module, inputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
            sums, counts = super().losses(model, inputs, targets)
            return 1e4 * sums, counts

    found = []
    for n in (len(job.rows) - 1, len(job.rows)):
        own = replace(job, rows=job.rows[:n])
        step = moved(own, train_together(adapted, Huge(), examples, [own], ONE, 1000)[0])
        found.append(n * torch.cat([x.flatten() for x in step.values()]))
    assert 0.0999 < (found[1] - found[0]).norm() < 0.1001


@pytest.mark.parametrize("kind", ["factors", "weights"])
def test_an_example_without_a_finite_gradient_adds_nothing(session, no_dropout, kind):
    adapted, examples = session
    job = replace(KINDS[kind](jobs(adapted)[0], 0), privacy=EVERY)

    class Broken(Classification):
        def losses(self, model: nn.Module, inputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
            sums, counts = super().losses(model, inputs, targets)
            lengths = inputs["attention_mask"].sum(1)
            return sums * torch.where(lengths == longest, torch.inf, 1.0), counts

    lengths = examples.lengths()[job.rows]
    longest = lengths.max()
    kept = replace(job, rows=job.rows[lengths < longest])
    assert 0 < len(kept.rows) < len(job.rows)
    broken = moved(job, train_together(adapted, Broken(), examples, [job], ONE, 1000)[0])
    sound = moved(kept, train_together(adapted, TASK, examples, [kept], ONE, 1000)[0])
    share = len(kept.rows) / len(job.rows)
    assert_close(broken, {key: x * share for key, x in sound.items()}, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("clip", [0.2, 1e6])
def test_so_does_a_step_of_a_whole_model(whole, no_dropout, clip):
    """All embeddings, norms and biases are within the clip."""
    adapted, examples, job = whole
    found = moved(job, train_together(adapted, TASK, examples, private([job], replace(EVERY, clip=clip)), ONE, 1000)[0])
    expected: dict[str, Tensor] = {}
    for row in job.rows:
        alone = replace(job, rows=row[None])
        own = moved(alone, train_together(adapted, TASK, examples, [alone], ONE, 1000)[0])
        norm = torch.cat([x.flatten() for x in own.values()]).norm()
        for key, x in own.items():
            expected[key] = expected.get(key, 0) + x * min(1, clip / (norm + 1e-6)) / len(job.rows)
    assert {"bert.embeddings.word_embeddings.weight.w", "bert.embeddings.LayerNorm.bias.w"} < found.keys()
    assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_one_more_example_changes_the_sum_of_a_whole_model_by_at_most_the_clip(whole):
    adapted, examples, job = whole
    sums = []
    for n in (len(job.rows) - 1, len(job.rows)):
        own = replace(job, rows=job.rows[:n], privacy=replace(EVERY, clip=0.01))
        step = moved(own, train_together(adapted, TASK, examples, [own], ONE, 1000)[0])
        sums.append(n * torch.cat([x.flatten() for x in step.values()]))
    assert 0.00999 < (sums[1] - sums[0]).norm() < 0.01001


def test_weights_of_some_fixed_entries_are_clipped_by_the_others(session, no_dropout):
    """The oracle trains on each example alone, and clips its step without these entries."""
    adapted, examples = session
    name = next(iter(adapted.spec.modules))
    job = unfactored(jobs(adapted)[0])
    trainable = torch.arange(adapted.spec.modules[name][1]) % 3 == 0
    job = replace(job, request=replace(job.request, mask={f"{name}.delta": trainable}))
    privacy = replace(EVERY, clip=0.2)
    found = moved(job, train_together(adapted, TASK, examples, private([job], privacy), ONE, 1000)[0])
    expected: dict[str, Tensor] = {}
    for row in job.rows:
        alone = replace(job, rows=row[None])
        own = moved(alone, train_together(adapted, TASK, examples, [alone], ONE, 1000)[0])
        assert own[f"{name}.delta"][:, ~trainable].count_nonzero() == 0
        norm = torch.cat([x.flatten() for x in own.values()]).norm()
        for key, x in own.items():
            expected[key] = expected.get(key, 0) + x * min(1, privacy.clip / (norm + 1e-6)) / len(job.rows)
    assert_close(found, expected, rtol=1e-3, atol=1e-5)


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.Size] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.found |= {
            x.shape for x in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(x, Tensor)
        }
        return result


def test_no_weight_has_a_gradient_for_each_example(session):
    """Eight clients with eight examples each, in one pass; a client's own gradients have the axis of the clients."""
    adapted, examples = session
    first = unfactored(jobs(adapted)[0])
    some = [replace(first, rows=torch.arange(5 * i, 5 * i + 8), seed=i) for i in range(8)]
    with Shapes() as shapes:
        train_together(adapted, TASK, examples, private(some, EVERY), ONE, 100_000)
    sizes = {tuple(sorted(size)) for size in adapted.spec.modules.values()}
    sizes |= {tuple(sorted(w.shape)) for w in adapted.spec.head.values() if w.ndim == 2}
    kept = [shape for shape in shapes.found if len(shape) == 3 and tuple(sorted(shape[1:])) in sizes]
    assert {shape[0] for shape in kept} == {8}


def test_an_empty_sample_takes_a_step_of_noise_that_counts(session):
    """Its standard deviation is noise_multiplier * clip / expected batch, in each trained tensor; padded and masked
    entries have none."""
    adapted, examples = session
    privacy = RecordPrivacy(clip=3.0, noise_multiplier=2.0, rate=1e-9, steps=100)
    some = private(jobs(adapted, mask=mask), privacy)
    masked = next(iter(adapted.spec.modules)) + ".b"
    for job, one in zip(some, train_together(adapted, TASK, examples, some, ONE, 1000), strict=True):
        assert one.steps == 1
        deviation = 3.0 * 2.0 / (1e-9 * len(job.rows))
        step = moved(job, one)
        assert step[masked][:, 1:].count_nonzero() == 0 and step[masked][:, 0].count_nonzero() > 0
        noise = {key: x / deviation for key, x in step.items() if key != masked}
        assert all(x.count_nonzero() == x.numel() for x in noise.values())
        whole = torch.cat([x.flatten() for x in noise.values()])
        assert whole.std() == pytest.approx(1, abs=4 / math.sqrt(2 * len(whole)))
        assert whole.mean() == pytest.approx(0, abs=4 / math.sqrt(len(whole)))


def test_noise_differs_between_steps_clients_tensors_and_rounds_and_is_repeated_by_a_repetition(session):
    adapted, examples = session
    privacy = RecordPrivacy(clip=1.0, noise_multiplier=1.0, rate=1e-9, steps=100)
    base = replace(jobs(adapted)[0], privacy=privacy)

    def noise(**changes: Any) -> Tensor:
        settings = ONE.model_copy(update={"max_steps": changes.pop("steps", 1)})
        job = replace(base, **changes)
        step = moved(job, train_together(adapted, TASK, examples, [job], settings, 1000)[0])
        return torch.cat([x.flatten() for x in step.values()])

    first = noise()
    assert torch.equal(noise(), first)
    second = noise(steps=2) - first
    others = [second, noise(seed=base.seed + 1), noise(entropy="os"), noise(entropy="os"), first.roll(1)]
    for other in others:
        assert abs(torch.corrcoef(torch.stack([first, other]))[0, 1]) < 6 / math.sqrt(len(first))
    assert abs(torch.corrcoef(torch.stack(others[2:4]))[0, 1]) < 6 / math.sqrt(len(first))


def test_dropout_and_augmentation_are_repeated_from_seeds_and_fresh_from_the_operating_system(session, monkeypatch):
    """Each example has a seed of its own in each step."""
    adapted, examples = session
    base = replace(jobs(adapted)[0], privacy=EVERY)

    def drawn(**changes: Any) -> tuple[list[int], list[int]]:
        masks, draws = list[int](), list[int]()
        pass_of, batch_of = ClientDropout.next_pass, type(examples).batch

        def next_pass(self: Any, generators: Any, *rest: Any) -> None:
            masks.extend(one.initial_seed() for one in generators)
            pass_of(self, generators, *rest)

        def batch(self: Any, rows: Any, device: Any, seeds: Any) -> Any:
            draws.extend(seeds.tolist())
            return batch_of(self, rows, device, seeds)

        with monkeypatch.context() as patched:
            patched.setattr(ClientDropout, "next_pass", next_pass)
            patched.setattr(type(examples), "batch", batch)
            train_together(adapted, TASK, examples, [replace(base, **changes)], SGD, 1000)
        return masks, draws

    assert drawn() == drawn()
    for found in zip(drawn(), drawn(entropy="os"), drawn(entropy="os"), strict=True):
        assert len({seed for one in found for seed in one}) == 3 * SGD.max_steps * len(base.rows)


def test_each_example_is_sampled_with_the_rate_on_its_own(session, monkeypatch):
    adapted, examples = session
    job = replace(jobs(adapted)[1], privacy=replace(EVERY, rate=0.3))
    sizes = []

    def counted(self: Any, client: int) -> Tensor:
        sizes.append(draw(self, client))
        return sizes[-1][:0]

    draw = private_gradients.PrivateGradients._sample
    monkeypatch.setattr(private_gradients.PrivateGradients, "_sample", counted)
    train_together(adapted, TASK, examples, [job], SGD.model_copy(update={"max_steps": 1000}), 1000)
    n, drawn_of_each = len(job.rows), torch.bincount(torch.cat(sizes))
    assert len(drawn_of_each) == n
    assert (drawn_of_each / 1000 - 0.3).abs().max() < 4 * math.sqrt(0.3 * 0.7 / 1000)
    count = torch.tensor([len(own) for own in sizes]).double()
    assert count.mean() == pytest.approx(0.3 * n, abs=4 * math.sqrt(n * 0.21 / 1000))
    assert count.var() == pytest.approx(0.21 * n, rel=0.2)  # of a fixed size: 0


def test_a_trainer_never_trains_a_client_without_privacy_beside_private_ones(session):
    adapted, examples = session
    x, y = jobs(adapted)[:2]
    rows = {"x": x.rows, "y": y.rows}
    trainer = LocalTrainer(adapted, TASK, examples, rows, {}, examples, Train(), 8, privacy={"x": SOME})
    with pytest.raises(ValueError, match="client 'y' has no privacy"):
        trainer.fit([FitRequest(y.request, ClientInfo("y", 4, 21), 0)], Round(0, 0))


def test_a_trainer_refuses_what_would_read_private_examples_without_noise(session):
    adapted, examples = session
    job, x = jobs(adapted)[0], ClientInfo("x", 2, 9)
    trainer = LocalTrainer(adapted, TASK, examples, {"x": job.rows}, {}, examples, Train(), 8, privacy={"x": SOME})
    with pytest.raises(UserError, match="the gradient of the examples"):
        trainer.gradient(x, Gradient(job.request.start, frozenset("b")))
    with pytest.raises(UserError, match="features of the examples"):
        trainer.features(x)
