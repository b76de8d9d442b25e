"""DoRA in our layers against PEFT's, and against dense weights."""

import copy
import importlib.util
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from fedlora.adapter import Adapter, lora_init
from fedlora.exporting.one_rank import unfit_for_one_rank
from fedlora.exporting.peft_folder import PeftFolder
from fedlora.exporting.write import to_merged, to_peft
from fedlora.methods.wrap.magnitudes import with_magnitudes
from fedlora.models.adapted import AdaptedModel, Scaling
from fedlora.models.dropout import ClientDropout
from fedlora.models.quantized import QuantizedLinear
from fedlora.parts.dora import Dora
from fedlora.tasks.causal_lm import CausalLM
from tiny_lm import lm_tokenizer, tiny_lm

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),  # PEFT's, about our twin
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
]

TARGETS = {"llama": ["embed_tokens", "q_proj", "down_proj", "lm_head"], "gpt2": ["wte", "c_attn", "c_fc", "lm_head"]}
IDS = torch.tensor([[9, 8, 7, 30, 9], [12, 40, 4, 5, 30]])
every_model = pytest.mark.parametrize(("kind", "tied"), [("llama", False), ("gpt2", True)])


class Net(nn.Module):
    """Non-square layers, stored both ways round."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second, self.last = nn.Linear(7, 12), Conv1D(5, 12), nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).tanh()).tanh())


def adapted_net(net: Net, dropout: float = 0.0, rslora: bool = False, **pattern: int) -> AdaptedModel:
    return AdaptedModel(copy.deepcopy(net), Scaling(16.0, rslora), ["first", "second", "last"], dropout, pattern, dora=True)


def moved(adapted: AdaptedModel, rank: int = 3, seed: int = 0) -> Adapter:
    """An adapter whose b is not zero, and whose magnitudes are not the weights' norms."""
    rng = torch.Generator().manual_seed(seed)
    start = with_magnitudes(lora_init(adapted.spec, rank, seed), adapted.spec.magnitudes)
    return {
        name: Dora(torch.randn(p.b.shape, generator=rng) / 9, p.a / 3, p.m * (0.5 + torch.rand(p.m.shape, generator=rng)))
        for name, p in start.items()
    }


def in_peft(model: nn.Module, adapter: Adapter, config: peft.LoraConfig) -> nn.Module:
    """PEFT's model with these factors."""
    wrapped = peft.get_peft_model(model, config)
    for name, part in adapter.items():
        layer = wrapped.base_model.model.get_submodule(name)
        values = (part.b / layer.scaling["default"], part.a, part.m)
        for parameter, value in zip(factors(layer), values, strict=True):
            parameter.data.copy_(value)
    return wrapped


def factors(layer: nn.Module) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """PEFT's b, a and m."""
    m = layer.lora_magnitude_vector["default"].weight
    if getattr(layer, "lora_embedding_A", None):
        return layer.lora_embedding_B["default"], layer.lora_embedding_A["default"], m
    return layer.lora_B["default"].weight, layer.lora_A["default"].weight, m


def gradients(adapted: AdaptedModel, client: int = 0) -> dict[str, list[Tensor]]:
    """Of b, a and m of each module."""
    return {n: [x.grad[client].clone() for x in vars(layer.part).values()] for n, layer in adapted.layers.items()}


def assert_near(found: dict[str, list[Tensor]], expected: dict[str, list[Tensor]], tolerance: float = 2e-6) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        for one, other in zip(found[name], expected[name], strict=True):
            assert (one - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("pattern", [{}, {"second": 2, "fi.*t": 6}])
@pytest.mark.parametrize("rslora", [False, True])
def test_forward_and_gradients_are_those_of_pefts_layer(rslora, pattern, dropout):
    net, x = Net(), torch.randn(6, 7, generator=torch.Generator().manual_seed(2))
    adapted = adapted_net(net, dropout, rslora, **pattern)
    adapter = moved(adapted)
    adapted.load_clients([adapter], "bam")
    config = peft.LoraConfig(
        r=3, lora_alpha=16, use_rslora=rslora, target_modules=[*adapter], lora_dropout=dropout, rank_pattern=pattern,
        use_dora=True,
    )  # fmt: skip
    twin = in_peft(net, adapter, config)
    outputs = []
    for model in (adapted.model, twin):
        torch.manual_seed(3)
        outputs.append(model.train()(x))
        outputs[-1].square().sum().backward()
    assert_close(outputs[0], outputs[1], rtol=1e-6, atol=1e-6)
    layers = {name: twin.base_model.model.get_submodule(name) for name in adapter}
    assert_near(gradients(adapted), {name: [x.grad for x in factors(layer)] for name, layer in layers.items()})


def test_the_magnitudes_start_at_pefts_and_leave_the_model_unchanged_bit_for_bit():
    net, x = Net(), torch.randn(6, 7)
    adapted = adapted_net(net)
    start = with_magnitudes(lora_init(adapted.spec, 3, 0), adapted.spec.magnitudes)
    adapted.load_clients([start])
    assert torch.equal(adapted.model(x), net(x))
    twin = peft.get_peft_model(net, peft.LoraConfig(r=3, target_modules=[*start], use_dora=True))
    for name, part in start.items():
        assert_close(part.m, factors(twin.base_model.model.get_submodule(name))[2].data)


@pytest.mark.parametrize("rest", [(), (5,)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_clients_of_unequal_ranks_together_compute_what_each_computes_alone(dropout, rest):
    adapted = adapted_net(Net(), dropout)
    clients, x = [moved(adapted, rank, seed=rank) for rank in (3, 1, 2)], torch.randn(3, 2, *rest, 7)

    def passed(group: list[int]) -> tuple[Tensor, list[dict[str, list[Tensor]]]]:
        adapted.load_clients([clients[i] for i in group], "bam")
        with ClientDropout() as dropping:
            generators = [torch.Generator().manual_seed(i) for i in group]
            dropping.next_pass(generators, [(rest[0] if rest else 1, 2)] * len(group))
            found = adapted.model.train()(x[group].flatten(0, 1))
        found.square().sum().backward()
        return found, [gradients(adapted, place) for place in range(len(group))]

    together, slopes = passed([0, 1, 2])
    for i, part in enumerate(together.unflatten(0, (3, 2))):
        alone, (expected,) = passed([i])
        assert_close(part, alone)
        for name, wanted in expected.items():
            for one, other in zip(slopes[i][name], wanted, strict=True):
                assert_close(one[tuple(slice(size) for size in other.shape)], other, rtol=1e-4, atol=1e-5)
                assert one.count_nonzero() == other.count_nonzero()  # none in the padding


def adapted_lm(folder: Path, kind: str, tied: bool) -> tuple[AdaptedModel, nn.Module]:
    """A model with DoRA in linear layers, embeddings and the output layer, and the same without."""
    model, _, _ = CausalLM().load(str(tiny_lm(folder, kind, tie_word_embeddings=tied)), (), 0)
    return AdaptedModel(copy.deepcopy(model), Scaling(16.0), TARGETS[kind], dora=True), model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@every_model
def test_a_language_model_with_dora_everywhere_has_the_gradients_of_peft(kind, tied, tmp_path):
    adapted, model = adapted_lm(tmp_path / "model", kind, tied)
    adapter = moved(adapted)
    adapted.load_clients([adapter], "bam")
    twin = in_peft(model, adapter, peft.LoraConfig(r=3, lora_alpha=16, target_modules=TARGETS[kind], use_dora=True))
    assert_close(logits(adapted.model), logits(twin), rtol=1e-5, atol=1e-5)
    for each in (adapted.model, twin):
        nn.functional.cross_entropy(each(input_ids=IDS).logits.mT, IDS.roll(-1, 1)).backward()
    layers = {name: twin.base_model.model.get_submodule(name) for name in adapter}
    assert_near(gradients(adapted), {name: [x.grad for x in factors(layer)] for name, layer in layers.items()}, 1e-4)


@every_model
def test_an_export_and_a_merged_model_compute_the_same(kind, tied, tmp_path):
    adapted, model = adapted_lm(tmp_path / "model", kind, tied)
    adapter, before = moved(adapted), logits(model)
    adapted.load_clients([adapter])
    own = logits(adapted.model)
    assert (own - before).abs().max() > 1e-2
    to_peft(adapter, tmp_path / "out", 0.0, "base", adapted, (), lm_tokenizer(), "CAUSAL_LM")
    assert_close(logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out")), own, rtol=1e-5, atol=1e-5)
    again = PeftFolder.read(tmp_path / "out")
    assert again.lora["dora"] and again.adapter.keys() == adapter.keys()
    for name, part in adapter.items():
        assert_close(vars(again.adapter[name]), vars(part), rtol=1e-6, atol=1e-6)
    assert "DoRA's magnitudes, which vLLM, LoRAX and llama.cpp do not support" in unfit_for_one_rank(adapter, adapted)
    to_merged(adapter, tmp_path / "merged", model, lm_tokenizer(), torch.float32)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_close(logits(merged), own, rtol=1e-5, atol=1e-5)


def test_a_folder_that_peft_saved_is_read(tmp_path):
    adapted, model = adapted_lm(tmp_path / "model", "llama", False)
    adapter = moved(adapted)
    config = peft.LoraConfig(r=3, lora_alpha=16, target_modules=TARGETS["llama"], use_dora=True, task_type="CAUSAL_LM")
    in_peft(model, adapter, config).save_pretrained(tmp_path / "out", save_embedding_layers=False)
    again = PeftFolder.read(tmp_path / "out").adapter
    assert again.keys() == adapter.keys()
    for name, part in adapter.items():
        assert_close(vars(again[name]), vars(part), rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_layer_computes_as_the_dense_one_it_stands_for(kind):
    layer = nn.Linear(128, 64)
    quantized = QuantizedLinear(layer, kind)
    layer.weight.data.copy_(quantized.weight)
    pair = [AdaptedModel(nn.Sequential(one), Scaling(16.0), "all-linear", dora=True) for one in (quantized, layer)]
    x, adapter = torch.randn(3, 128), moved(pair[1])
    for adapted in pair:
        adapted.load_clients([adapter], "bam")
        adapted.model(x).square().sum().backward()
    assert_close(pair[0].model(x), pair[1].model(x), rtol=1e-5, atol=1e-5)
    assert_near(gradients(pair[0]), gradients(pair[1]), 1e-5)


def test_a_base_in_bf16_computes_with_norms_in_fp32():
    net, x = Net(), torch.randn(6, 7)
    low = AdaptedModel(copy.deepcopy(net), Scaling(16.0), ["first", "second", "last"], precision=torch.bfloat16, dora=True)
    full = adapted_net(net)
    adapter = moved(full)
    assert all(torch.equal(m, low.spec.magnitudes[name]) for name, m in full.spec.magnitudes.items())
    for adapted in (low, full):
        adapted.load_clients([adapter], "bam")
        adapted.model(x.to(adapted.dtype)).float().square().sum().backward()
    found, expected = (torch.cat([x.flatten() for xs in gradients(one).values() for x in xs]) for one in (low, full))
    assert found.dtype == torch.float32 and (found - expected).norm() < 0.05 * expected.norm()
