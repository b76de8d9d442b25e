"""The gradient of a client's loss is what one step of plain gradient descent on all its examples moves."""

from dataclasses import replace

import pytest
import torch

from batched_jobs import jobs, session  # noqa: F401  (a fixture)
from fedlora.adapter import pack
from fedlora.config.sections import Train
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Gradient
from fedlora.models.layers import LoraLayer
from fedlora.parts.dense import Dense
from fedlora.parts.heads import Heads
from fedlora.tasks.classification import Classification
from fedlora.train.batched import train_together
from fedlora.train.local import LocalTrainer

TASK = Classification()
WHO = ClientInfo("x", 3, 5)


@pytest.mark.parametrize("kind", ["two factors and the head", "heads"])
def test_it_is_what_a_step_on_all_examples_moves(session, kind, monkeypatch):  # noqa: F811
    adapted, examples = session
    job = jobs(adapted)[0]
    start, train = job.request.start, frozenset("baw")
    if kind == "heads":
        start = {n: p if isinstance(p, Dense) else two_heads(p) for n, p in start.items()}
        train = frozenset("cs")
    settings = Train(batch_size=2, optimizer="sgd", lr=1e4)
    trainer = LocalTrainer(adapted, TASK, examples, {"x": job.rows}, {}, examples, settings, eval_batch_size=4)
    found, before = pack(trainer.gradient(WHO, Gradient(start, train))), pack(start)
    whole = replace(job, request=replace(job.request, start=start, train=train))
    for module in adapted.model.modules():
        if isinstance(module, torch.nn.Dropout):
            monkeypatch.setattr(module, "p", 0.0)
        elif isinstance(module, LoraLayer):
            monkeypatch.setattr(module, "dropout", 0.0)
    one_step = settings.model_copy(update={"batch_size": len(job.rows)})
    trained = train_together(adapted, TASK, examples, [whole], one_step, 100_000)[0]
    assert trained.steps == 1
    for key, after in pack(trained.adapter).items():
        name, _, factor = key.rpartition(".")
        if factor in train:
            scale = adapted.spec.scale(name, start[name].rank) if factor == "b" else 1.0  # b is that times PEFT's lora_B
            moved = (before[key] - after) / (scale**2 * settings.lr)
            assert (found[key] - moved).norm() < 1e-3 * moved.norm(), key
        else:
            assert torch.equal(found[key], before[key])


def two_heads(part: LowRank) -> Heads:
    """Of rank 1 each."""
    generator = torch.Generator().manual_seed(0)
    return Heads(b=part.b[:, :2], c=torch.randn(2, 1, 1, generator=generator), s=torch.tensor([1.0, 2.0]), a=part.a[:2])
