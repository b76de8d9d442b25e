"""Gradients of single examples from one backward pass, against one backward pass for each, in fp64."""

from dataclasses import fields

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from fedlora.linalg.token_products import TokenProducts
from fedlora.models.layers import ClientLayout, LoraLayer, PerClientLayer
from fedlora.parts.dense import Dense
from fedlora.parts.table import mapped, stacked
from fedlora.parts.weight_change import WeightChange
from fedlora.train.per_example import add_clipped, example_passes
from parts.kinds import drawn, examples

OUT, IN, RANK, TOKENS = 7, 5, 3, 4
KINDS = examples(OUT, IN, RANK)


def layer_of(kind: type, clients: int, client_layout: ClientLayout) -> LoraLayer:
    """A layer with a part of this kind for each client, all different, whose floating factors are trained."""
    layer = LoraLayer(nn.Linear(IN, OUT).double().requires_grad_(False), 0.0, client_layout)
    parts = [mapped(KINDS[kind], lambda x, i=i: x + i * drawn(*x.shape, seed=i) / 3) for i in range(clients)]
    layer.row_norms = layer.base.weight.norm(dim=1)
    layer.part = mapped(stacked(parts), lambda x: nn.Parameter(x))
    layer.row_norms = layer.base.weight.norm(dim=1)
    layer.scale = torch.linspace(0.5, 2, clients, dtype=torch.float64)[:, None, None]
    return layer


def loss(layer: nn.Module, x: Tensor, real: Tensor) -> Tensor:
    """The loss of each row, of its real tokens alone; the layer is called twice."""
    y = layer(x)
    again = layer(y[..., :IN].tanh())
    return ((y.square() + again.sin()).sum(-1) * real).sum(1)


def each_alone(layer: nn.Module, parameters: list[Tensor], layout: ClientLayout, x: Tensor, real: Tensor, places: Tensor):
    """The gradients of each row [rows, *shape], from a pass of its own with the parameters of its client."""
    found = []
    for row, place in enumerate(places.tolist()):
        layout.index = torch.tensor([place])
        gradients = torch.autograd.grad(loss(layer, x[row : row + 1], real[row : row + 1]).sum(), parameters)
        found.append([g[place] for g in gradients])
    layout.index = None
    return [torch.stack(own) for own in zip(*found, strict=True)]


def together(layer: nn.Module, parameters: list[Tensor], layout: ClientLayout, x: Tensor, real: Tensor, places: Tensor):
    with layout.each_example(places) as gradients:
        loss(layer, x, real).sum().backward()
        return [formed(gradients.of(p)) for p in parameters]


def formed(gradients: Tensor | TokenProducts | None) -> Tensor | None:
    if not isinstance(gradients, TokenProducts):
        return gradients
    return torch.stack([gradients.weighted_sum(row) for row in torch.eye(len(gradients.p)).to(gradients.p)])


@pytest.mark.parametrize("clients", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_each_example_has_the_gradient_that_it_has_alone(kind, clients):
    """Unequal numbers of examples of unequal lengths, padded; the module is used twice."""
    layout = ClientLayout()
    layer = layer_of(kind, clients, layout)
    parameters = [getattr(layer.part, f.name) for f in fields(kind)]
    places = torch.tensor([0, clients - 1, 0, clients // 2, 0])
    x, real = drawn(len(places), TOKENS, IN), torch.arange(TOKENS) < torch.tensor([4, 1, 3, 2, 4])[:, None]
    found = together(layer, parameters, layout, x, real, places)
    assert_close(found, each_alone(layer, parameters, layout, x, real, places), rtol=1e-12, atol=1e-12)
    assert all(p.grad is None for p in parameters) and layout.index is None


@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize("base", [nn.Linear(IN, OUT), nn.LayerNorm(IN)], ids=["linear", "norm"])
def test_so_does_each_example_in_a_head(base, clients):
    layout = ClientLayout()
    layer = PerClientLayer(base.double(), layout)
    layer.per_client = {
        name: Dense(nn.Parameter(torch.stack([drawn(*w.shape, seed=i) for i in range(clients)])))
        for name, w in base.named_parameters()
    }
    parameters = [part.w for part in layer.per_client.values()]
    places = torch.tensor([clients - 1, 0, 0, clients - 1])
    x, real = drawn(len(places), TOKENS, IN), torch.ones(len(places), TOKENS)
    found = together(layer, parameters, layout, x, real, places)
    assert_close(found, each_alone(layer, parameters, layout, x, real, places), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("clients", [1, 3])
def test_so_does_each_example_in_an_embedding_whose_weight_is_trained(clients):
    layout = ClientLayout()
    layer = LoraLayer(nn.Embedding(IN, OUT).double().requires_grad_(False), 0.0, layout)
    layer.part = WeightChange(nn.Parameter(drawn(clients, OUT, IN)))
    layer.scale = torch.ones(clients, 1, 1)
    places, ids = (
        torch.tensor([clients - 1, 0, 0, clients // 2]),
        torch.tensor([[0, 4, 4], [1, 1, 1], [3, 0, 2], [2, 2, 0]]),
    )
    real = torch.arange(3) < torch.tensor([3, 2, 1, 3])[:, None]

    def loss_of(rows: slice) -> Tensor:
        return ((layer(ids[rows]).square() + layer(ids[rows].flip(1)).sin()).sum(-1) * real[rows]).sum()

    with layout.each_example(places) as gradients:
        loss_of(slice(None)).backward()
        found = gradients.of(layer.part.delta)
    assert isinstance(found, TokenProducts) and layer.part.delta.grad is None
    expected = []
    for row, place in enumerate(places.tolist()):
        layout.index = torch.tensor([place])
        (gradient,) = torch.autograd.grad(loss_of(slice(row, row + 1)), layer.part.delta)
        expected.append(gradient[place])
    layout.index = None
    assert_close(formed(found), torch.stack(expected), rtol=1e-12, atol=1e-12)
    assert_close(found.norms(), torch.stack(expected).flatten(1).norm(dim=1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("clients", [1, 3])
def test_a_weight_has_the_same_gradients_with_and_without_copies(clients):
    layout = ClientLayout()
    layer = layer_of(WeightChange, clients, layout)
    places = torch.tensor([0, clients - 1, 0, clients // 2])
    x, real, delta = drawn(len(places), TOKENS, IN).requires_grad_(), torch.ones(len(places), TOKENS), layer.part.delta
    found = []
    for copied in ((), (id(delta),)):
        with layout.each_example(places, copied) as gradients:
            loss(layer, x, real).sum().backward()
            found.append(gradients.of(delta))
    assert isinstance(found[0], TokenProducts) and isinstance(found[1], Tensor)
    assert not found[0].p.requires_grad and not found[0].q.requires_grad  # sums would keep the graphs of all passes
    assert_close(formed(found[0]), found[1], rtol=1e-12, atol=1e-12)


def test_a_weight_has_the_gradients_of_fp32_copies_beside_a_base_in_bf16():
    layout = ClientLayout()
    layer = layer_of(WeightChange, 2, layout).to(torch.bfloat16)
    layer.part = WeightChange(nn.Parameter(drawn(2, OUT, IN).float()))
    places, x = torch.tensor([0, 1, 1]), drawn(3, TOKENS, IN).bfloat16()
    found = []
    for copied in ((), (id(layer.part.delta),)):
        with layout.each_example(places, copied) as gradients:
            loss(layer, x, torch.ones(3, TOKENS)).sum().backward()
            found.append(formed(gradients.of(layer.part.delta)))
    assert found[0].dtype == found[1].dtype == torch.float32
    assert (found[0] - found[1]).norm() < 0.02 * found[1].norm()


def test_frozen_factors_get_no_gradient():
    layout = ClientLayout()
    layer = layer_of(next(iter(KINDS)), 2, layout)
    layer.part.a.requires_grad_(False)
    x = drawn(2, TOKENS, IN)
    found = together(layer, [layer.part.b, layer.part.a], layout, x, torch.ones(2, TOKENS), torch.tensor([0, 1]))
    assert found[0] is not None and found[1] is None


def test_the_sum_of_a_client_has_each_gradient_at_most_at_the_clip_and_none_that_is_not_finite():
    each = {"x": drawn(6, 3, 2), "y": drawn(6, 4)}
    each["y"][3, 1] = torch.inf
    each["x"][4, 0, 0] = torch.nan
    places, clips = torch.tensor([0, 1, 1, 0, 1, 1]), torch.tensor([0.5, 3.0], dtype=torch.float64)
    sums = {"x": torch.zeros(2, 3, 2).double(), "y": torch.ones(2, 4).double()}
    add_clipped(sums, each, places, clips)
    expected = {"x": torch.zeros(2, 3, 2).double(), "y": torch.ones(2, 4).double()}
    for row in (0, 1, 2, 5):
        norm = torch.cat([each["x"][row].flatten(), each["y"][row]]).norm()
        for key, total in expected.items():
            total[places[row]] += each[key][row] * min(1, clips[places[row]] / (norm + 1e-6))
    assert_close(sums, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [2, 9], ids=["by Gram matrices", "formed one by one"])
def test_products_of_tokens_are_clipped_and_summed_as_the_matrices_that_they_stand_for(tokens):
    """Beside another tensor, with examples that have no finite gradient, and a client without examples."""
    p, q = drawn(6, tokens, OUT), drawn(6, tokens, IN)
    p[3, 1, 0], q[4, 0, 2] = torch.inf, torch.nan
    products, other = TokenProducts(p, q, (OUT, IN)), drawn(6, 4)
    places, clips = torch.tensor([0, 1, 1, 0, 1, 1]), torch.tensor([0.5, 3.0, 1.0], dtype=torch.float64)
    found = []
    for each in (products, p.mT @ q):
        found.append({"x": torch.ones(3, OUT, IN).double(), "y": torch.ones(3, 4).double()})
        add_clipped(found[-1], {"x": each, "y": other}, places, clips)
    assert_close(*found, rtol=1e-12, atol=1e-12)
    assert (found[0]["x"][:2] != 1).all() and (found[0]["x"][2] == 1).all()


def test_one_more_example_changes_the_clipped_sum_by_at_most_the_clip():
    each = {"x": 100 * drawn(5, 3, 2), "y": drawn(5, 4)}
    found = []
    for n in (4, 5):
        sums = {"x": torch.zeros(1, 3, 2).double(), "y": torch.zeros(1, 4).double()}
        add_clipped(sums, {k: x[:n] for k, x in each.items()}, torch.zeros(n, dtype=torch.long), torch.tensor([0.7]))
        found.append(torch.cat([x.flatten() for x in sums.values()]))
    assert 0.69 < (found[1] - found[0]).norm() <= 0.7


def test_passes_have_all_examples_once_within_both_limits():
    lengths = [3, 9, 1, 4, 7, 2, 2, 5]
    groups = example_passes(lengths, 20, 4)
    assert sorted(i for group in groups for i in group) == list(range(8))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) / 20 + len(group) / 4 <= 1
    assert len(example_passes(lengths, 1000, 1000)) == 1 and len(example_passes(lengths, 1, 1)) == 8
    assert example_passes([], 5, 5) == []
