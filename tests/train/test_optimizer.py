"""The optimizer's groups and the learning rates of clients in one step."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from fedlora.config.sections import Train
from fedlora.models.targets import head_modules, norm_modules, within
from fedlora.train.optimizer import make_optimizer, optimizer_step

from architectures import model_of


@pytest.mark.parametrize(
    "kind", ["albert", "bart", "bert", "electra", "gpt2", "llama", "mobilebert", "modernbert", "opt", "roberta", "t5"]
)
def test_of_heads_and_norms_those_parameters_decay_that_decay_in_transformers_trainer(kind, tmp_path):
    model = model_of(kind)
    trained = (*(head := head_modules(model, ())), *norm_modules(model, head))
    parameters = {f"{n}.w": nn.Parameter(p[None]) for n, p in model.named_parameters() if within(n, trained)}
    optimizer = make_optimizer(Train(weight_decay=0.1), parameters, {})
    names = {parameter: key.removesuffix(".w") for key, parameter in parameters.items()}
    ours = {names[p] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    theirs = Trainer(model, TrainingArguments(str(tmp_path), report_to="none")).get_decay_parameter_names(model)
    assert ours and ours == set(names.values()) & set(theirs)


def test_factors_decay_whatever_their_shape():
    parameters = {f"x.{factor}": nn.Parameter(torch.ones(2, 3)) for factor in "bs"}
    groups = make_optimizer(Train(weight_decay=0.1), parameters, {}).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1]


@pytest.mark.parametrize(
    "settings",
    [
        Train(lr=0.1, weight_decay=0.5, eps=1e-3),
        Train(lr=0.1, weight_decay=0.5, optimizer="sgd", momentum=0.9, nesterov=True),
    ],
    ids=lambda value: value.optimizer,
)
def test_each_client_steps_as_with_a_learning_rate_of_its_own(settings):
    """Three clients in one optimizer, and each in torch's own with its learning rates."""
    start, rng = torch.linspace(-1, 1, 12).view(3, 2, 2), torch.Generator().manual_seed(0)
    rates = [[0.0, 1.0, 0.3], [0.5, 0.5, 0.5], [1.0, 0.0, 0.1], [0.0, 0.0, 0.0]]
    together = nn.Parameter(start.clone())
    alone = [nn.Parameter(x.clone()) for x in start]
    optimizer = make_optimizer(settings, {"x.b": together}, {"b": 2.0})
    plain = [make_optimizer(settings, {"x.b": x}, {}) for x in alone]
    for each in rates:
        gradient = torch.randn(start.shape, generator=rng)
        together.grad = gradient.clone()
        optimizer_step(optimizer, each)
        for i, rate in enumerate(each):
            alone[i].grad = gradient[i].clone()
            plain[i].param_groups[0]["lr"] = 2 * settings.lr * rate
            plain[i].step()
    assert_close(together.data, torch.stack([x.data for x in alone]), rtol=1e-6, atol=1e-6)


def test_equal_rates_are_the_optimizers_own_step_to_the_bit():
    start = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    ours, plain = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = make_optimizer(Train(lr=0.1, weight_decay=0.1), {"x.b": ours}, {})
    other = torch.optim.AdamW([plain], lr=0.1 * 0.3, weight_decay=0.1, fused=True)
    for _ in range(3):
        ours.grad, plain.grad = copy.deepcopy(start), copy.deepcopy(start)
        optimizer_step(optimizer, [0.3, 0.3])
        other.step()
    assert torch.equal(ours, plain)
