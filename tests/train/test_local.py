"""One client's training and evaluation against a plain loop around PEFT's model."""

import copy
import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.testing import assert_close
from transformers.trainer_pt_utils import get_parameter_names

from fedlora.adapter import Adapter, lora_init, pack
from fedlora.config.sections import Train
from fedlora.data.files import columns
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Fit, FitRequest, Round, Trained
from fedlora.models.adapted import AdaptedModel, Scaling
from fedlora.models.dropout import ClientDropout
from fedlora.models.requests import check_request
from fedlora.parts.dense import Dense
from fedlora.parts.dora import Dora
from fedlora.parts.table import Factors
from fedlora.randomness import generator
from fedlora.tasks.classification import Classification
from fedlora.tasks.task import Examples
from fedlora.train.batched import train_together
from fedlora.train.batches import epoch
from fedlora.train.evaluate import score
from fedlora.train.job import Job
from fedlora.train.local import LocalTrainer

from tiny import LABELS, tiny_bert, tiny_rows

TASK, ROWS, SEED, PACE = Classification(), torch.arange(30), 5, 6


@dataclass(frozen=True)
class Setup:
    """One model three times over: plain, and with our LoRA layers (dropout 0.1)."""

    model: nn.Module
    tokenizer: Any
    texts: list[str]
    examples: Examples
    adapted: AdaptedModel
    start: Adapter


@pytest.fixture(scope="module")
def setup(tmp_path_factory) -> Setup:
    folder: Path = tmp_path_factory.mktemp("local")
    model, tokenizer, _ = TASK.load(str(tiny_bert(folder / "model")), LABELS, seed=0)
    table = columns(tiny_rows(folder / "rows.jsonl", 40), "data.source")
    table["label"] = [LABELS.index(label) for label in table["label"]]
    adapted = AdaptedModel(copy.deepcopy(model), Scaling(16.0), dropout=0.1, head=["classifier"])
    rng = torch.Generator().manual_seed(1)
    factors = {n: LowRank(torch.randn(p.b.shape, generator=rng) / 9, p.a) for n, p in lora_init(adapted.spec, 4, 2).items()}
    start = {**factors, **{name: Dense(w) for name, w in adapted.spec.head.items()}}
    return Setup(model, tokenizer, table["text"], TASK.encode(tokenizer, table, 64), adapted, start)


def in_peft(setup: Setup, train: str) -> nn.Module:
    """PEFT's model with the factors of `setup.start`, of which those in `train` are trainable."""
    save, dora = ["classifier"] if "w" in train else None, any(isinstance(part, Dora) for part in setup.start.values())
    config = peft.LoraConfig(r=4, lora_alpha=16, lora_dropout=0.1, modules_to_save=save, use_dora=dora)
    twin = peft.get_peft_model(copy.deepcopy(setup.model), config)
    for name, layer in twin.named_modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            part = setup.start[name.removeprefix("base_model.model.")]
            layer.lora_A["default"].weight.data.copy_(part.a)
            layer.lora_B["default"].weight.data.copy_(part.b / (16 / 4))
            layer.lora_A.requires_grad_("a" in train)
            layer.lora_B.requires_grad_("b" in train)
            if isinstance(part, Dora):
                layer.lora_magnitude_vector["default"].weight.data.copy_(part.m)
                layer.lora_magnitude_vector.requires_grad_("m" in train)
    return twin


NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""Of transformers' `Trainer.get_decay_parameter_names`."""


def plain_optimizer(twin: nn.Module, settings: Train, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    """torch's optimizer with Trainer's groups, and transformers' schedule."""
    decays = set(get_parameter_names(twin, [nn.LayerNorm], NO_DECAY))
    named = [(name, parameter) for name, parameter in twin.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in named if name in decays], "weight_decay": settings.weight_decay},
        {"params": [p for name, p in named if name not in decays], "weight_decay": 0.0},
    ]
    if settings.optimizer == "sgd":
        optimizer: Any = torch.optim.SGD(
            groups, settings.lr, momentum=settings.momentum, nesterov=settings.nesterov, weight_decay=0.0
        )
    else:
        optimizer = torch.optim.AdamW(groups, settings.lr, (settings.beta1, settings.beta2), settings.eps)
    name = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
    warmup = settings.warmup if settings.warmup >= 1 else math.ceil(settings.warmup * steps)
    return optimizer, transformers.get_scheduler(name, optimizer, warmup, steps)


def plain_loop(setup: Setup, train: str, settings: Train, criterion: nn.Module | None = None) -> Trained:
    """The training as anybody would write it, with the batches of `epoch`, and with the model's own loss by default."""
    twin = in_peft(setup, train).train()
    parameters = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    an_epoch = -(-len(ROWS) // settings.batch_size)
    steps = settings.max_steps or settings.epochs * an_epoch
    optimizer, schedule = plain_optimizer(twin, settings, steps)
    lengths = torch.tensor([len(setup.tokenizer(setup.texts[row])["input_ids"]) for row in ROWS])
    order, masks = generator(SEED, "order"), [generator(SEED, "dropout")]
    losses: list[tuple[float, int]] = []
    for index in itertools.count():
        shared_order_seed = generator(PACE, "pace", index)
        for batch in epoch(lengths, settings.batch_size, settings.batches == "by-length", order, shared_order_seed):
            if len(losses) == steps:
                last = losses[-an_epoch:]
                mean = sum(loss * rows for loss, rows in last) / sum(rows for _, rows in last)
                return Trained(out_of_peft(twin, setup.start), mean, steps)
            inputs = setup.tokenizer([setup.texts[row] for row in batch], padding=True, return_tensors="pt")
            optimizer.zero_grad()
            with ClientDropout() as chance:
                chance.next_pass(masks, [(inputs["input_ids"].shape[1], len(batch))])
                targets = setup.examples.targets[batch]
                found = twin(**inputs, labels=targets)
            loss = found.loss if criterion is None else criterion(found.logits, targets)
            loss.backward()
            if settings.clip_norm:
                nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
            optimizer.step()
            schedule.step()
            losses.append((loss.item(), len(batch)))
    raise AssertionError("unreachable")


def out_of_peft(twin: nn.Module, names: Adapter) -> Adapter:
    found = peft.get_peft_model_state_dict(twin) | dict(twin.base_model.model.named_parameters())
    adapter: dict[str, Factors] = {}
    for name, part in names.items():
        inside = f"base_model.model.{name}"
        if isinstance(part, Dense):
            adapter[name] = Dense(found[inside if inside in found else name])
            continue
        b, a = found[f"{inside}.lora_B.weight"] * (16 / 4), found[f"{inside}.lora_A.weight"]
        adapter[name] = Dora(b, a, found[f"{inside}.lora_magnitude_vector"]) if isinstance(part, Dora) else LowRank(b, a)
    return adapter


def answered(setup: Setup, request: Fit, settings: Train, seed: int = SEED) -> Trained:
    job = Job(request, ROWS, seed, PACE)
    return train_together(setup.adapted, TASK, setup.examples, [job], settings, max_tokens=1000)[0]


def trained(setup: Setup, train: str, settings: Train, seed: int = SEED) -> Trained:
    return answered(setup, Fit(setup.start, frozenset(train)), settings, seed)


@pytest.mark.parametrize(
    ("train", "settings"),
    [
        ("baw", Train(lr=1e-3, epochs=2)),
        ("ba", Train(lr=1e-3, epochs=2, weight_decay=0.1)),
        ("b", Train(lr=1e-3, batches="random")),
        ("aw", Train(lr=1e-3, clip_norm=0.05)),
        ("baw", Train(optimizer="sgd", lr=0.1, epochs=2)),
        ("ba", Train(optimizer="sgd", lr=0.1, clip_norm=0.05, batches="random")),
        ("b", Train(optimizer="sgd", lr=0.1, weight_decay=0.1, batch_size=7)),
        ("baw", Train(lr=1e-2, weight_decay=0.3, beta1=0.8, beta2=0.9, eps=1e-3)),
        ("baw", Train(optimizer="sgd", lr=0.1, weight_decay=0.3, momentum=0.9, epochs=2)),
        ("baw", Train(optimizer="sgd", lr=0.1, weight_decay=0.3, momentum=0.9, nesterov=True)),
        ("baw", Train(lr=1e-2, schedule="linear", weight_decay=0.3, epochs=2)),
        ("baw", Train(lr=1e-2, schedule="cosine", warmup=0.3, epochs=2)),
        ("ba", Train(lr=1e-2, warmup=3, clip_norm=0.05)),
        ("ba", Train(optimizer="sgd", lr=0.1, momentum=0.9, schedule="cosine", warmup=1)),
        ("ba", Train(lr=1e-2, schedule="linear", max_steps=6, epochs=9)),
        ("ba", Train(lr=1e-2, max_steps=1)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.optimizer,
)
def test_one_client_trains_as_a_plain_loop_around_peft_does(setup, train, settings):
    ours, plain = trained(setup, train, settings), plain_loop(setup, train, settings)
    assert_close(ours.loss, plain.loss, rtol=1e-5, atol=1e-6)
    assert ours.steps == plain.steps
    assert_close(pack(ours.adapter), pack(plain.adapter), rtol=1e-5, atol=1e-5)
    factors = {
        key.rpartition(".")[2] for key, x in pack(ours.adapter).items() if not torch.equal(x, pack(setup.start)[key])
    }
    assert factors == set(train)


@pytest.mark.parametrize(
    ("train", "settings"),
    [
        ("bamw", Train(lr=1e-2, weight_decay=0.1, epochs=2)),
        ("bm", Train(optimizer="sgd", lr=0.1, clip_norm=0.05)),
    ],
    ids=["adamw", "sgd"],
)
def test_one_client_trains_dora_as_a_plain_loop_around_peft_does(setup, train, settings):
    """With weight decay also of the magnitudes, as Trainer has it, and with dropout."""
    adapted = AdaptedModel(copy.deepcopy(setup.model), Scaling(16.0), dropout=0.1, head=["classifier"], dora=True)
    norms = adapted.spec.magnitudes
    start = {n: Dora(p.b, p.a, norms[n] * 1.1) if isinstance(p, LowRank) else p for n, p in setup.start.items()}
    setup = replace(setup, adapted=adapted, start=start)
    ours, plain = trained(setup, train, settings), plain_loop(setup, train, settings)
    assert_close(ours.loss, plain.loss, rtol=1e-5, atol=1e-6)
    assert_close(pack(ours.adapter), pack(plain.adapter), rtol=1e-5, atol=1e-5)
    factors = {key.rpartition(".")[2] for key, x in pack(ours.adapter).items() if not torch.equal(x, pack(start)[key])}
    assert factors == set(train)


@pytest.mark.parametrize(
    ("smoothing", "weights"),
    [(0.2, None), (0.0, [0.5, 4.0, 1.0]), (0.3, [0.5, 4.0, 1.0])],
    ids=["smooth", "weights", "both"],
)
def test_smoothed_and_weighted_losses_train_as_in_a_plain_loop_with_those_of_torch(setup, smoothing, weights):
    settings, task = Train(lr=1e-2), Classification(smoothing, weights)
    criterion = nn.CrossEntropyLoss(None if weights is None else torch.tensor(weights), label_smoothing=smoothing)
    job = Job(Fit(setup.start, frozenset("baw")), ROWS, SEED, PACE)
    (ours,) = train_together(setup.adapted, task, setup.examples, [job], settings, max_tokens=1000)
    plain, unsmoothed = plain_loop(setup, "baw", settings, criterion), plain_loop(setup, "baw", settings)
    assert_close(pack(ours.adapter), pack(plain.adapter), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(*(pack(one.adapter)["classifier.weight.w"] for one in (ours, unsmoothed)), atol=1e-4)


def test_training_depends_on_its_seed_and_not_on_the_global_generator(setup):
    first = pack(trained(setup, "ba", Train()).adapter)
    torch.manual_seed(12345)
    second, other = (pack(trained(setup, "ba", Train(), seed).adapter) for seed in (SEED, SEED + 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first if key.endswith((".b", ".a")))


def test_training_leaves_the_global_generator_as_it_was(setup):
    before = torch.get_rng_state()
    trained(setup, "ba", Train())
    assert torch.equal(torch.get_rng_state(), before)


def trainer(setup: Setup) -> LocalTrainer:
    rows, held_out = {"x": ROWS[:20], "y": ROWS[20:]}, {"x": torch.arange(30, 40), "y": ROWS[:0]}
    return LocalTrainer(setup.adapted, TASK, setup.examples, rows, held_out, setup.examples, Train(), eval_batch_size=8)


def test_steps_are_batches_and_as_many_as_epochs_have_are_those_epochs(setup):
    settings, a_round = Train(batch_size=4, lr=1e-3), -(-len(ROWS) // 4)
    for epochs in (1, 2):
        by_steps = answered(setup, Fit(setup.start, frozenset("ba"), steps=epochs * a_round), settings)
        by_epochs = answered(setup, Fit(setup.start, frozenset("ba"), epochs=epochs), settings)
        assert (by_steps.steps, by_steps.loss) == (by_epochs.steps, by_epochs.loss)
        assert all(torch.equal(x, pack(by_epochs.adapter)[key]) for key, x in pack(by_steps.adapter).items())
    one = answered(setup, Fit(setup.start, frozenset("ba"), steps=1), settings)
    assert one.steps == 1 and not torch.equal(*(next(iter(pack(x.adapter).values())) for x in (one, by_steps)))


def test_a_request_for_steps_or_epochs_precedes_the_steps_of_the_run(setup):
    settings = Train(batch_size=10, max_steps=5)
    asked = {"steps": 2}, {"epochs": 2}, {}
    found = [answered(setup, Fit(setup.start, frozenset("b"), **each), settings).steps for each in asked]
    assert found == [2, 2 * 3, 5]


def test_a_round_trains_with_its_share_of_the_learning_rate(setup):
    settings, client = Train(lr=0.1, round_schedule="linear", min_lr_rate=0.2), ClientInfo("x", 4, 20)
    asked = FitRequest(Fit(setup.start, frozenset("ba")), client, 0)
    for index, lr in enumerate((0.1, 0.08, 0.06, 0.04)):
        ours, plain = (
            replace(trainer(setup), settings=each, rounds=4).fit([asked], Round(index, 0))[0]
            for each in (settings, Train(lr=lr))
        )
        assert_close(pack(ours.adapter), pack(plain.adapter), rtol=1e-5, atol=1e-6)


def test_a_constant_correction_is_added_to_each_gradient_of_the_adapter(setup):
    settings, lr, scale = Train(optimizer="sgd", lr=0.01), 0.01, 16 / 4
    constant = {key: torch.randn_like(x) for key, x in pack(setup.start).items()}
    for steps in (1, 3):
        request = Fit(setup.start, frozenset("b"), steps=steps)
        plain, moved = (
            pack(answered(setup, one, settings).adapter) for one in (request, replace(request, correction=constant))
        )
        if steps == 1:  # b = scale * lora_B, so the gradient of lora_B is scale times that of b
            for key, x in moved.items():
                wanted = plain[key] - lr * scale**2 * constant[key] if key.endswith(".b") else plain[key]
                assert_close(x, wanted, rtol=1e-4, atol=1e-5)
        else:
            assert any(not torch.equal(x, plain[key]) for key, x in moved.items())


def test_both_steps_and_epochs_or_a_correction_of_another_shape_are_rejected(setup):
    for bad in ({"steps": 2, "epochs": 1}, {"steps": 0}, {"correction": {"x.b": torch.zeros(1)}}):
        with pytest.raises(ValueError, match=r"steps = |correction of"):
            check_request(setup.adapted.spec, Fit(setup.start, frozenset("ba"), **bad))


def test_a_client_trains_the_same_whoever_trained_before_it(setup):
    x, y = ClientInfo("x", 4, 20), ClientInfo("y", 4, 10)
    asked = FitRequest(Fit(setup.start, frozenset("ba")), y, 0)
    (alone,) = trainer(setup).fit([asked], Round(0, 0))
    trainer(setup).fit([FitRequest(Fit(setup.start, frozenset("baw")), x, 0)], Round(0, 0))
    (after,) = trainer(setup).fit([asked], Round(0, 0))
    assert all(torch.equal(tensor, pack(after.adapter)[key]) for key, tensor in pack(alone.adapter).items())


def test_a_client_without_held_out_examples_has_no_score(setup):
    y, x = trainer(setup).scores([(ClientInfo("y", 4, 10), setup.start), (ClientInfo("x", 4, 20), setup.start)])
    assert y is None and x.examples == 10


def plain_score(setup: Setup) -> dict[str, float]:
    """One example at a time in PEFT's model."""
    twin = in_peft(setup, "").eval()
    with torch.no_grad():
        logits = torch.cat([twin(**setup.tokenizer(text, return_tensors="pt")).logits for text in setup.texts])
    targets = setup.examples.targets
    loss = nn.functional.cross_entropy(logits, targets)
    return {"accuracy": float((logits.argmax(-1) == targets).float().mean()), "loss": float(loss)}


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_the_score_is_that_of_a_plain_loop_whatever_the_batch_size_and_the_order(setup, batch_size):
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(batch_size))
    (found,) = score(setup.adapted, TASK, setup.examples, [(shuffled, setup.start)], batch_size)
    assert found.examples == 40
    assert_close(
        {name: TASK.metrics(found)[name] for name in ("accuracy", "loss")}, plain_score(setup), rtol=1e-5, atol=1e-6
    )


def test_scoring_comes_out_the_same_after_training_on_the_same_model(setup):
    (before,) = score(setup.adapted, TASK, setup.examples, [(ROWS, setup.start)], 8)
    trained(setup, "baw", Train(lr=0.1))
    (after,) = score(setup.adapted, TASK, setup.examples, [(ROWS, setup.start)], 8)
    assert_close(dict(after.sums), dict(before.sums), rtol=0, atol=0)


def random_mask(setup: Setup, factors: str, seed: int = 3) -> dict[str, torch.Tensor]:
    """Half of the ranks of each module: columns of b, rows of a."""
    rng, mask = torch.Generator().manual_seed(seed), {}
    for name, part in setup.start.items():
        if isinstance(part, LowRank):
            keep = torch.randperm(part.rank, generator=rng) < part.rank // 2
            mask |= {key: x for key, x in ((f"{name}.b", keep[None]), (f"{name}.a", keep[:, None])) if key[-1] in factors}
    return mask


def answer(setup: Setup, settings: Train, train: str = "baw", **request: Any) -> dict[str, torch.Tensor]:
    return pack(answered(setup, Fit(setup.start, frozenset(train), **request), settings).adapter)


DECAYING = [
    Train(lr=0.01, epochs=2, weight_decay=0.1),
    Train(lr=0.01, weight_decay=0.1, clip_norm=0.05),
    Train(optimizer="sgd", lr=0.1, weight_decay=0.1),
    Train(optimizer="sgd", lr=0.1, weight_decay=0.1, momentum=0.9, schedule="linear"),
]


@pytest.mark.parametrize("settings", DECAYING, ids=lambda value: value.optimizer)
@pytest.mark.parametrize("factors", ["ba", "b", "a"])
def test_what_the_mask_leaves_out_does_not_move_by_a_bit_and_all_else_moves(setup, settings, factors):
    mask, before = random_mask(setup, factors), pack(setup.start)
    after = answer(setup, settings, mask=mask)
    for key, x in after.items():
        fixed = ~mask[key].expand_as(x) if key in mask else torch.zeros_like(x, dtype=torch.bool)
        assert torch.equal(x[fixed], before[key][fixed])
        assert (x != before[key])[~fixed].float().mean() > 0.9


def test_masked_entries_stay_also_where_the_scale_of_the_model_rounds(setup):
    start = {n: LowRank(p.b[:, :3], p.a[:3]) for n, p in setup.start.items() if isinstance(p, LowRank)}  # alpha / 3
    mask = {f"{name}.b": torch.tensor([[True, False, False]]) for name in start}
    found = answered(setup, Fit(start, frozenset("b"), mask=mask), Train())
    for name, part in found.adapter.items():
        assert torch.equal(part.b[:, 1:], start[name].b[:, 1:]) and not torch.equal(part.b, start[name].b)


@pytest.mark.parametrize("settings", DECAYING, ids=lambda value: value.optimizer)
def test_a_mask_that_lets_all_move_and_rates_of_one_change_no_bit(setup, settings):
    everything = {key: torch.ones_like(x, dtype=torch.bool) for key, x in pack(setup.start).items()}
    masked, plain = answer(setup, settings, mask=everything, rates={"b": 1.0}), answer(setup, settings)
    assert all(torch.equal(masked[key], plain[key]) for key in plain)


@pytest.mark.parametrize(
    "settings",
    [Train(optimizer="sgd", lr=10.0, clip_norm=1e-5), Train(optimizer="sgd", lr=1000.0, weight_decay=1e-4)],
    ids=["clipped", "decaying"],
)
def test_a_factor_that_may_move_nowhere_is_as_one_that_is_not_trained(setup, settings):
    """It counts in no norm, and while the others are trained it does not decay either."""
    nowhere = {key: torch.zeros_like(x, dtype=torch.bool) for key, x in pack(setup.start).items() if key.endswith(".a")}
    masked, untrained, both = (
        answer(setup, settings, "ba", mask=nowhere),
        answer(setup, settings, "b"),
        answer(setup, settings, "ba"),
    )
    assert_close(masked, untrained, rtol=1e-5, atol=1e-9)
    assert any(not torch.allclose(both[key], x, rtol=1e-5, atol=1e-9) for key, x in untrained.items() if key.endswith(".b"))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_rates_multiply_the_learning_rate_of_a_factor(setup, optimizer):
    one_step = {"optimizer": optimizer, "batch_size": 64, "lr": 1e-3}
    before = pack(setup.start)
    plain, faster = answer(setup, Train(**one_step)), answer(setup, Train(**one_step), rates={"b": 5.0, "w": 0.5})
    for key, x in faster.items():
        rate = {"b": 5.0, "a": 1.0, "w": 0.5}[key.rpartition(".")[2]]
        assert_close(x - before[key], rate * (plain[key] - before[key]), rtol=1e-3, atol=2e-6)
