"""All parameters of a model, trained in their places."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from fedlora.adapter import Adapter, Scaling
from fedlora.errors import UserError
from fedlora.linalg.token_products import TokenProducts
from fedlora.models.adapted import AdaptedModel
from fedlora.models.targets import head_modules
from fedlora.parts.dense import Dense
from fedlora.parts.weight_change import WeightChange
from tiers import fast

from architectures import CONFIGS, model_of

QUICK = ("bert", "gpt2", "llama", "bart", "t5", "deberta-v2", "albert", "mixtral")
"""Among them: shared embeddings, shared blocks, parameters that another module reads, weights without a module."""


class Tied(nn.Module):
    """A weight that two modules share, a parameter of the model itself, and one whose module is not called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shift = nn.Parameter(torch.randn(5))
        self.embed, self.out, self.mid = nn.Embedding(9, 5), nn.Linear(5, 9, bias=False), nn.Linear(5, 5)
        self.out.weight = self.embed.weight
        self.read, self.score = nn.LayerNorm(5), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.mid(self.embed(x) + self.shift) * self.read.weight
        return self.score(self.out(hidden).tanh())


def start_of(adapted: AdaptedModel, seed: int = 0) -> Adapter:
    """The model's own parameters, moved."""
    rng, spec = torch.Generator().manual_seed(seed), adapted.spec
    moved = {name: torch.randn(size, generator=rng).double() / 20 for name, size in spec.modules.items()}
    head = {name: Dense(w + torch.randn(w.shape, generator=rng).to(w) / 20) for name, w in spec.head.items()}
    return {**{name: WeightChange(delta) for name, delta in moved.items()}, **head}


def set_to(model: nn.Module, adapter: Adapter) -> nn.Module:
    """A copy of the plain model with these parameters, which are trained."""
    plain = copy.deepcopy(model).requires_grad_(True)
    with torch.no_grad():
        for name, part in adapter.items():
            if isinstance(part, Dense):
                plain.get_parameter(name).copy_(part.w)
            else:
                weight = plain.get_submodule(name).weight
                weight += part.delta.mT if isinstance(plain.get_submodule(name), Conv1D) else part.delta
    return plain


def assert_same_gradients(adapted: AdaptedModel, model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Of all parameters, as of those of the plain model, of which the head is a part; and the output is the same."""
    start = start_of(adapted)
    plain, modules = set_to(model, start).eval(), adapted.spec.modules
    assert adapted.spec.head.keys() == dict(plain.named_parameters()).keys() - {f"{name}.weight" for name in modules}
    adapted.load_clients([start], {"delta", "w"})
    found, expected = (output_of(each, inputs) for each in (adapted.model.eval(), plain))
    assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    for name, part in adapted.gradient(0, start, {"delta", "w"}).items():
        module, weight = (plain.get_submodule(name), f"{name}.weight") if name in modules else (None, name)
        slope = plain.get_parameter(weight).grad
        slope = torch.zeros_like(plain.get_parameter(weight)) if slope is None else slope
        own = part.w if isinstance(part, Dense) else part.delta
        assert_close(own, slope.mT if isinstance(module, Conv1D) else slope, msg=lambda m, name=name: f"{name}: {m}")


def assert_same_gradients_of_an_example(adapted: AdaptedModel, model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Of all parameters, without gradients of the parameters themselves."""
    start = start_of(adapted)
    plain, trained = set_to(model, start).eval(), adapted.load_clients([start], {"delta", "w"})
    with adapted.client_layout.each_example(torch.zeros(1, dtype=torch.long)) as gradients:
        output_of(adapted.model.eval(), inputs).square().sum().backward()
        found = [gradients.of(x) for x in trained]
    assert all(x.grad is None for x in trained)
    output_of(plain, inputs).square().sum().backward()
    for key, x in zip(start, found, strict=True):
        slope = plain.get_parameter(key if isinstance(start[key], Dense) else f"{key}.weight").grad
        if isinstance(x, TokenProducts):
            x = x.weighted_sum(torch.ones(1).double())[None]
            slope = slope.mT if isinstance(plain.get_submodule(key.removesuffix(".weight")), Conv1D) else slope
        assert (x is None) == (slope is None), key
        if x is not None:
            assert_close(x[0], slope, msg=lambda m, key=key: f"{key}: {m}")


def output_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    found = model(**inputs)
    return found if isinstance(found, Tensor) else found.logits


def test_shared_and_indirectly_read_parameters_have_their_whole_gradient():
    model, inputs = Tied().double(), {"x": torch.randint(9, (4, 6), generator=torch.Generator().manual_seed(0))}
    adapted = AdaptedModel(copy.deepcopy(model), Scaling(), ["mid"], head=["score"], whole=True)
    assert {"shift", "embed.weight", "mid.bias", "read.weight"} < adapted.spec.head.keys()
    assert_same_gradients(adapted, model, inputs)
    assert_same_gradients_of_an_example(adapted, model, {"x": inputs["x"][:1]})


@pytest.mark.parametrize("kind", fast([kind for kind in CONFIGS if kind != "reformer"], *QUICK))
def test_every_parameter_of_a_transformer_has_the_gradient_that_it_has_in_the_plain_model(kind):
    model = model_of(kind, torch.float64)
    ids = torch.randint(5, 99, (3, 16), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = 3  # the end of a sequence, for encoder-decoders
    head = head_modules(model, ())
    adapted = AdaptedModel(copy.deepcopy(model), Scaling(16.0), "all-linear", head=head, whole=True)
    assert_same_gradients(adapted, model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert_same_gradients_of_an_example(adapted, model, {"input_ids": ids[:1], "attention_mask": torch.ones_like(ids[:1])})


def test_without_a_client_and_after_an_error_the_model_has_its_own_parameters():
    model, x = Tied(), torch.zeros(1, 2, dtype=torch.long)
    adapted = AdaptedModel(copy.deepcopy(model), Scaling(), ["mid"], head=["score"], whole=True)
    own = dict(adapted.model.named_parameters())
    adapted.load_clients([start_of(adapted)])
    with pytest.raises(IndexError):
        adapted.model(x + 99)
    assert all(own[name] is parameter for name, parameter in adapted.model.named_parameters())
    adapted.load_clients([])
    assert torch.equal(adapted.model(x), model(x))


def test_a_base_in_low_precision_trains_the_parameters_themselves_in_fp32():
    adapted = AdaptedModel(Tied(), Scaling(), ["mid"], head=["score"], whole=True, precision=torch.bfloat16)
    trained = adapted.load_clients([start_of(adapted)], {"w"})
    adapted.model(torch.zeros(1, 2, dtype=torch.long)).square().sum().backward()
    assert {x.dtype for x in trained} == {torch.float32} and adapted.model.shift.dtype == torch.bfloat16
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in trained if x.shape[1:] == (9, 5))


def test_a_weight_that_is_adapted_and_shared_is_refused_by_name():
    with pytest.raises(UserError, match=r"^embed\.weight is the weight of several modules.*lora\.targets"):
        AdaptedModel(Tied(), Scaling(), ["out"], head=["score"], whole=True)


def test_a_quantized_parameter_is_refused_by_name():
    model = Tied()
    model.read.weight = nn.Parameter(torch.ones(5, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UserError, match=r"^read\.weight is quantized, "):
        AdaptedModel(model, Scaling(), ["mid"], head=["score"], whole=True)
    assert not AdaptedModel(model, Scaling(), ["mid"], head=["score"]).whole


def test_two_clients_cannot_be_loaded_together():
    adapted = AdaptedModel(Tied(), Scaling(), ["mid"], head=["score"], whole=True)
    with pytest.raises(AssertionError, match="cannot be loaded together"):
        adapted.load_clients([start_of(adapted, 0), start_of(adapted, 1)])
