"""The initial factors of `lora.init`, for every method."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fedlora import evaluate
from fedlora.adapter import AdapterSpec, lora_init
from fedlora.api import resume, run
from fedlora.config.experiment import Experiment, build
from fedlora.errors import UserError
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo
from fedlora.methods.table import TABLE
from fedlora.models.adapted import AdaptedModel, Scaling
from fedlora.rounds.codec import outline
from test_export import in_peft, own_logits
from tiers import fast
from tiny_tasks import tiny_task

from toy import SPEC, toy_method

ANY = [name for name, row in TABLE.items() if row.init == "any"]


@pytest.mark.parametrize("name", TABLE)
def test_the_initialization_matters_to_every_method_without_factors_of_its_own(name):
    method = toy_method(TABLE[name])

    def tensors(spec: AdapterSpec) -> list[torch.Tensor]:
        client = ClientInfo("x", method.rank, 4)
        return [
            x for state in (method.init_server(spec, 0), method.init_client(spec, client, 0)) for x in outline(state)[1]
        ]

    pairs = zip(tensors(SPEC), tensors(replace(SPEC, init="gaussian")), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs) == (TABLE[name].init == "own")


def test_gaussian_factors_have_pefts_deviation():
    spec = AdapterSpec({"q": (40, 500)}, init="gaussian")
    part = lora_init(spec, 4, 0)["q"]
    assert not part.b.any() and float(part.a.std()) == pytest.approx(1 / 4, rel=0.1)
    assert not torch.equal(part.a, lora_init(spec, 4, 1)["q"].a)


@pytest.mark.parametrize("rslora", [False, True])
def test_principal_parts_are_pefts_pissa_and_learn_as_there(rslora):
    """Singular vectors are unique up to sign: products are compared, before and after a step of gradient descent."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Linear(12, 5)), torch.randn(6, 7)
    config = peft.LoraConfig(r=3, lora_alpha=12, use_rslora=rslora, target_modules=["0", "2"], init_lora_weights="pissa")
    before = net(x).detach()
    adapted = AdaptedModel(
        nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Linear(12, 5)), Scaling(12.0, rslora), ["0", "2"], init="pissa"
    )
    for name, layer in adapted.layers.items():
        layer.base.load_state_dict(net.get_submodule(name).state_dict())
    twin = peft.get_peft_model(net, config)
    start = lora_init(adapted.spec, 3, 0)
    adapted.keep_beside_base({name: LowRank(-part.b, part.a) for name, part in start.items()})
    trained = adapted.load_clients([start], "ba")
    assert_close(adapted.model(x), before, rtol=1e-5, atol=1e-5)
    theirs = [p for p in twin.parameters() if p.requires_grad]
    for model, parameters in ((adapted.model, trained), (twin, theirs)):
        model(x).square().sum().backward()
        for parameter in parameters:
            parameter.data -= 0.01 * parameter.grad
    after = adapted.read(0, start, "ba")
    for name, part in start.items():
        layer = twin.base_model.model.get_submodule(name)
        assert_close(part.b.mT @ part.b / adapted.spec.scale(name, 3) ** 2, part.a @ part.a.mT, rtol=1e-3, atol=1e-4)
        assert_close(after[name].product(), layer.get_delta_weight("default"), rtol=1e-4, atol=1e-5)
        assert (after[name].product() - part.product()).abs().max() > 1e-3
    assert_close(adapted.model(x), twin(x), rtol=1e-4, atol=1e-5)


def experiment(tmp_path: Path, **settings: Any) -> Experiment:
    given = tiny_task("classification", tmp_path / "task")
    train = {"lr": 0.01, "max_steps": 2, "max_length": 32}
    return Experiment.model_validate(
        {"rounds": 2, "seed": 3, "clients": {"count": 2, "partition": "iid"}, **given, "train": train, **settings}
    )


@pytest.mark.parametrize("name", fast(ANY, "fedex-lora"))
def test_a_run_from_principal_parts_starts_at_the_pretrained_model_resumes_and_is_exported(name, tmp_path):
    settings = experiment(tmp_path, lora={"init": "pissa"}, method={"name": name, "rank": 4})
    found = run(settings, tmp_path / "run")
    plain = run(
        settings.model_copy(update={"lora": settings.lora.model_copy(update={"init": "uniform"}), "rounds": 1}),
        tmp_path / "plain",
    )
    if not TABLE[name].personal:
        assert found.rows[0].global_["loss"] == pytest.approx(plain.rows[0].global_["loss"], rel=1e-5)
        assert found.rows[1].global_["loss"] != pytest.approx(plain.rows[1].global_["loss"], rel=1e-5)
    run(settings.model_copy(update={"rounds": 1}), tmp_path / "half")
    again = resume(tmp_path / "half", overrides=["rounds=2"])
    assert [row.train_loss for row in again.rows] == [row.train_loss for row in found.rows]
    if not TABLE[name].personal:
        assert evaluate(found.folder) == found.rows[-1].global_
        scores = [evaluate(path, settings.data.source) for path in (found.folder, found.folder / "adapter")]
        assert scores[1]["loss"] == pytest.approx(scores[0]["loss"], rel=1e-4)
    for client, own in own_logits(found.folder).items():
        assert_close(in_peft(found.folder, found.folder / "adapter" / client), own, rtol=1e-4, atol=1e-4)


def test_initial_factors_that_a_method_cannot_start_from_are_refused():
    for name, init, reason in (
        ("flora", "pissa", "it starts from b = 0, or draws a on each machine; use uniform or gaussian"),
        ("ffa-lora", "pissa", "it starts from b = 0"),
        ("fed-sb", "gaussian", "it has initial factors of its own"),
    ):
        with pytest.raises(UserError, match=f"lora.init = '{init}' is not supported by {name}: {reason}"):
            build({"method": {"name": name}, "lora": {"init": init}})
