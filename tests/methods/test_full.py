"""FedAvg of the weights themselves."""

import copy

import torch
from torch import nn
from torch.testing import assert_close

from fedlora.adapter import Scaling
from fedlora.messages import Reply, Upload
from fedlora.methods.full import FullFineTuning
from fedlora.models.adapted import AdaptedModel
from fedlora.parts.weight_change import WeightChange

from toy import toy_clients
from uploads import ROUND, SPEC, merged_by


def test_the_mean_of_the_weights_is_exact():
    clients, seed = toy_clients(3), torch.Generator().manual_seed(0)
    sent = [{f"{n}.delta": torch.randn(size, generator=seed) for n, size in SPEC.modules.items()} for _ in clients]
    replies = [Reply(c, ROUND, Upload(x), float(c.examples)) for c, x in zip(clients, sent, strict=True)]
    merged, total = merged_by(FullFineTuning(), replies), sum(client.examples for client in clients)
    for key, x in merged.server.items():
        assert_close(x, sum(c.examples / total * each[key] for c, each in zip(clients, sent, strict=True)))
    assert merged.notes["aggregation_error"] < 1e-6


def test_the_change_has_the_gradient_of_the_weight_itself_whatever_alpha_and_dropout():
    net = nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Linear(12, 5))
    x, adapted = torch.randn(6, 7), AdaptedModel(copy.deepcopy(net), Scaling(24.0), ["0", "2"], dropout=0.9)
    trained = adapted.load_clients([{name: WeightChange(torch.zeros(size)) for name, size in sizes(adapted)}], {"delta"})
    adapted.model.train()(x).square().sum().backward()
    net(x).square().sum().backward()
    for parameter, layer in zip(trained, (net[0], net[2]), strict=True):
        assert_close(parameter.grad[0], layer.weight.grad)


def sizes(adapted: AdaptedModel) -> list[tuple[str, tuple[int, int]]]:
    return list(adapted.spec.modules.items())
