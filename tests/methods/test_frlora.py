"""The exact laws of FRLoRA."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

from fedlora.adapter import AdapterSpec
from fedlora.messages import Merged, Reply, Round
from fedlora.methods.frlora import FRLoRA
from fedlora.rounds.simulate import SimulationBackend

from merging import merge
from toy import SPEC, MemoryStates, Recorder, ToyTrainer, products, toy_clients

CLIENTS = toy_clients(3, 2)
TOTAL = sum(client.examples for client in CLIENTS)


def replies(m: FRLoRA, server: Any, index: int, trainer: Any) -> list[Reply]:
    rnd = Round(index, 0)
    sent = {client: m.send(server, client, rnd) for client in CLIENTS}
    return list(SimulationBackend(m, trainer.spec, CLIENTS, MemoryStates(), trainer, 0).train_clients(rnd, sent, {}))


def after(m: FRLoRA, rounds: int, trainer: Any) -> list[Merged[Any]]:
    merged, server = [], m.init_server(SPEC, 0)
    for index in range(rounds):
        merged.append(merge(m, server, replies(m, server, index, trainer), SPEC))
        trainer.merge_into_base(merged[-1].base_update)
    return merged


def weight(name: str) -> Tensor:
    assert SPEC.weight is not None
    return SPEC.weight(name)


def test_training_starts_from_the_best_fit_to_the_weights_on_the_base_without_it():
    m = FRLoRA(rank=2)
    request = next(m.work(None, m.send(m.init_server(SPEC, 0), CLIENTS[0], Round(0, 0)), CLIENTS[0], Round(0, 0)))
    for name, start in products(request.start).items():
        u, s, vt = torch.linalg.svd(weight(name))
        assert_close(start, (u[:, :2] * s[:2]) @ vt[:2], rtol=1e-5, atol=1e-5)
        assert_close(start, -products(request.frozen_extra)[name])


def test_a_round_starts_from_exactly_the_model_that_the_last_one_ended_with():
    """base + fold is the base beside the negative start, with the mean factors; the view adds nothing."""
    m, server = FRLoRA(rank=2), FRLoRA(rank=2).init_server(SPEC, 0)
    found = replies(m, server, 0, ToyTrainer())
    merged = merge(m, server, found, SPEC)
    for name, view in products(m.view(None, m.send(merged.server, CLIENTS[0], Round(1, 0)), CLIENTS[0])).items():
        b, a = (sum(r.weight / TOTAL * r.upload.values[f"{name}.{side}"] for r in found) for side in "ba")
        assert_close(merged.base_update[name].product() + view, b @ a - server[name].product(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train_a", [True, False])
def test_without_local_training_the_base_stays(train_a):
    (merged,) = after(FRLoRA(rank=2, train_a=train_a), 1, ToyTrainer(steps=0))
    assert all(part.product().abs().max() < 1e-5 for part in merged.base_update.values())


def test_with_a_frozen_the_base_update_is_the_mean_of_the_clients_changes():
    m, trainer = FRLoRA(rank=2, train_a=False), Recorder()
    (merged,) = after(m, 1, trainer)
    start = products(m.init_server(SPEC, 0))
    for name, base_update in products(merged.base_update).items():
        changes = [(client.examples / TOTAL, products(trainer.last[client.id])[name] - start[name]) for client in CLIENTS]
        assert_close(base_update, sum(w * change for w, change in changes), rtol=1e-4, atol=1e-5)
        assert merged.base_update[name].rank == 2
    assert merged.notes["aggregation_error"] < 1e-5


def test_with_both_trained_the_error_is_that_of_the_mean_factors():
    m, trainer = FRLoRA(rank=2), Recorder()
    (merged,) = after(m, 1, trainer)
    start, base_update = products(m.init_server(SPEC, 0)), products(merged.base_update)
    ideal = {
        name: sum(client.examples / TOTAL * (products(trainer.last[client.id])[name] - start[name]) for client in CLIENTS)
        for name in start
    }
    apart = sum((ideal[name] - base_update[name]).square().sum() for name in start).sqrt()
    assert_close(
        merged.notes["aggregation_error"],
        float(apart / sum(x.square().sum() for x in ideal.values()).sqrt()),
        rtol=1e-3,
        atol=0,
    )


def test_after_t_rounds_the_base_has_changed_by_a_rank_of_at_most_t_plus_one_times_r():
    trainer = ToyTrainer()
    for rounds in (1, 2):
        after(FRLoRA(rank=2), 1, trainer)
        assert torch.linalg.matrix_rank(trainer.base["layer.2.q"], rtol=1e-5) <= (rounds + 1) * 2


def test_the_start_is_pefts_pissa_with_the_models_scale():
    layer, scale = nn.Linear(20, 48, bias=False), 16 / 4
    spec = AdapterSpec({"0": (48, 20)}, weight=lambda name: layer.weight.detach().clone())
    state = FRLoRA(rank=4, scale_in_init=scale).init_server(spec, 0)["0"]
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["0"], init_lora_weights="pissa")
    theirs = get_peft_model(nn.Sequential(layer), config).base_model.model[0]
    b, a = theirs.lora_B["default"].weight, theirs.lora_A["default"].weight
    assert_close(state.product(), (scale * b @ a).detach(), rtol=1e-4, atol=1e-5)
    assert_close(state.b.abs(), (scale * b).detach().abs(), rtol=1e-3, atol=1e-4)
    assert_close(state.a.abs(), a.detach().abs(), rtol=1e-3, atol=1e-4)


def test_a_spec_that_cannot_read_the_weights_is_refused():
    with pytest.raises(ValueError, match="pretrained weights"):
        FRLoRA().init_server(AdapterSpec(SPEC.modules), 0)
