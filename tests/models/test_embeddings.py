"""Factors of embeddings and of the output layer of a language model, against PEFT's."""

import copy
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.testing import assert_close

from fedlora.adapter import Adapter, lora_init
from fedlora.exporting.one_rank import unfit_for_one_rank
from fedlora.exporting.peft_folder import PeftFolder
from fedlora.exporting.write import to_merged, to_peft
from fedlora.linalg.lowrank import LowRank
from fedlora.models.adapted import AdaptedModel, Scaling
from fedlora.models.targets import find_targets
from fedlora.tasks.causal_lm import CausalLM
from fedlora.train.features import try_packing
from fedlora.train.independence import safe_clients_per_step
from tiny_lm import lm_tokenizer, tiny_lm

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),  # PEFT's, about our twin
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
]

TARGETS = {"llama": ["embed_tokens", "q_proj", "lm_head"], "gpt2": ["wte", "c_attn", "lm_head"]}
IDS = torch.tensor([[9, 8, 7, 30, 9], [12, 40, 4, 5, 30]])


def adapted_lm(folder: Path, kind: str, tied: bool) -> tuple[AdaptedModel, nn.Module]:
    """A model with factors, and the same without."""
    source = tiny_lm(folder, kind, tie_word_embeddings=tied)
    model, _, _ = CausalLM().load(str(source), (), 0)
    return AdaptedModel(copy.deepcopy(model), Scaling(16.0), TARGETS[kind]), model


def moved(adapted: AdaptedModel, seed: int = 0) -> Adapter:
    rng = torch.Generator().manual_seed(seed)
    start = lora_init(adapted.spec, 3, seed)
    return {name: LowRank(torch.randn(part.b.shape, generator=rng) / 9, part.a / 3) for name, part in start.items()}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


every_model = pytest.mark.parametrize(("kind", "tied"), [("llama", False), ("llama", True), ("gpt2", True)])


@every_model
def test_an_exported_adapter_of_embeddings_and_output_layer_computes_the_same_in_peft(kind, tied, tmp_path):
    adapted, model = adapted_lm(tmp_path / "model", kind, tied)
    adapter, before = moved(adapted), logits(model)
    adapted.load_clients([adapter])
    own = logits(adapted.model)
    to_peft(adapter, tmp_path / "out", 0.0, "base", adapted, (), lm_tokenizer(), "CAUSAL_LM")
    assert_close(logits(peft.PeftModel.from_pretrained(model, tmp_path / "out")), own, rtol=1e-5, atol=1e-5)
    again = PeftFolder.read(tmp_path / "out").adapter
    assert again.keys() == adapter.keys()
    assert all(torch.allclose(again[name].product(), part.product(), atol=1e-5) for name, part in adapter.items())
    assert (own - before).abs().max() > 1e-2


@every_model
def test_gradients_of_embeddings_and_output_layer_are_those_in_peft(kind, tied, tmp_path):
    adapted, model = adapted_lm(tmp_path / "model", kind, tied)
    adapter = moved(adapted)
    adapted.load_clients([adapter], "ba")
    twin = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=16, target_modules=TARGETS[kind]))
    for name, part in adapter.items():
        layer = twin.base_model.model.get_submodule(name)
        a, b = factors(layer)
        a.data.copy_(part.a)
        b.data.copy_(part.b / layer.scaling["default"])
    for each in (adapted.model, twin):
        nn.functional.cross_entropy(each(input_ids=IDS).logits.mT, IDS.roll(-1, 1)).backward()
    for name, layer in adapted.layers.items():
        a, b = factors(twin.base_model.model.get_submodule(name))
        assert_close(layer.part.a.grad[0], a.grad, rtol=1e-4, atol=1e-6)
        assert_close(layer.part.b.grad[0], b.grad, rtol=1e-4, atol=1e-6)


def factors(layer: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """PEFT's a and b."""
    if layer.lora_embedding_A:
        return layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


@every_model
def test_a_merged_model_with_tied_embeddings_has_two_weights(kind, tied, tmp_path):
    adapted, model = adapted_lm(tmp_path / "model", kind, tied)
    adapter = moved(adapted)
    adapted.load_clients([adapter])
    to_merged(adapter, tmp_path / "merged", model, lm_tokenizer(), torch.float32)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_close(logits(merged), logits(adapted.model), rtol=1e-5, atol=1e-5)


@every_model
def test_base_updates_of_an_embedding_do_not_change_the_output_layer_that_it_is_tied_to(kind, tied, tmp_path):
    adapted, model = adapted_lm(tmp_path / "model", kind, tied)
    change = moved(adapted)
    adapted.load_clients([change])
    expected = logits(adapted.model)
    adapted.merge_into_base({name: LowRank(part.b / 2, part.a) for name, part in change.items()})
    adapted.merge_into_base({name: LowRank(part.b / 2, part.a) for name, part in change.items()})
    adapted.load_clients([])
    assert_close(logits(adapted.model), expected, rtol=1e-5, atol=1e-5)
    pretrained = AdaptedModel(model, Scaling(), TARGETS[kind]).spec.weight
    assert all(torch.equal(adapted.spec.weight(name), pretrained(name)) for name in change)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_clients_with_their_own_embeddings_and_output_layers_are_trained_together(kind, tmp_path):
    """The test at load compares losses and gradients with those of each client alone."""
    adapted, _ = adapted_lm(tmp_path / "model", kind, tied=True)
    try_packing(adapted, CausalLM(), lm_tokenizer(), 32)
    assert safe_clients_per_step(adapted, CausalLM(), lm_tokenizer(), 4, 32) == 4
    assert adapted.packing.works


@pytest.mark.parametrize("targets", [None, "all-linear", r".*"])
def test_only_a_list_names_embeddings_and_the_output_layer(targets, tmp_path):
    model, _, _ = CausalLM().load(str(tiny_lm(tmp_path)), (), 0)
    sizes = find_targets(model, targets, {}, ()).sizes
    assert sizes and not {"model.embed_tokens", "lm_head"} & sizes.keys()
    assert find_targets(model, ["embed_tokens"], {}, ()).sizes == {"model.embed_tokens": (32, model.config.vocab_size)}


def test_a_is_drawn_for_an_embedding_as_for_inputs_of_length_one(tmp_path):
    adapted, _ = adapted_lm(tmp_path, "llama", tied=True)
    a = lora_init(adapted.spec, 8, 0)["model.embed_tokens"].a
    assert float(a.std()) == pytest.approx(1.0, abs=0.1)


def test_an_adapter_of_an_embedding_is_refused_by_the_forms_for_servers(tmp_path):
    adapted, _ = adapted_lm(tmp_path, "llama", tied=False)
    reason = unfit_for_one_rank(moved(adapted), adapted)
    assert reason == (
        "model.embed_tokens is an embedding, whose factors are not supported in this form; export a merged model"
    )
