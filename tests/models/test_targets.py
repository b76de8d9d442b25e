"""Which modules are the head and which get factors, over many architectures, against the model's own parts and PEFT."""

import copy
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from fedlora.adapter import Adapter, lora_init
from fedlora.config.sections import Lora
from fedlora.errors import UserError
from fedlora.exporting.write import to_peft
from fedlora.linalg.lowrank import LowRank
from fedlora.models.adapted import AdaptedModel, Scaling
from fedlora.models.targets import _peft_targets, check_ranks, find_targets, head_modules
from fedlora.parts.dense import Dense
from fedlora.tasks.classification import Classification
from tiers import fast

from architectures import CONFIGS, model_of
from tiny import LABELS, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")

QUICK = ("bart", "bert", "distilbert", "gpt2", "modernbert", "roberta", "t5", "xlnet")
KINDS = fast(CONFIGS, *QUICK)


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(4, 128, (3, 7), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = 3  # eos
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def moved(adapted: AdaptedModel) -> Adapter:
    """An adapter with every factor and every entry of the head moved."""
    low = {n: LowRank(0.3 * torch.randn_like(part.b), part.a) for n, part in lora_init(adapted.spec, 4, 0).items()}
    return {**low, **{n: Dense(w + 0.3 * torch.randn_like(w)) for n, w in adapted.spec.head.items()}}


def targets(model: Any) -> list[str] | None:
    """PEFT's default, where it has one."""
    known = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    return None if model.config.model_type in known else [n for n, m in model.base_model.named_modules() if linear(m)][:2]


def linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_of_a_complete_checkpoint_is_all_that_lies_outside_its_base_model(kind):
    model = model_of(kind).eval()
    head = head_modules(model, ())
    within = [n for n, _ in model.named_parameters() if any(n.startswith(f"{module}.") for module in head)]
    assert within == [n for n, _ in model.named_parameters() if not n.startswith(f"{model.base_model_prefix}.")] != []


@pytest.mark.parametrize("kind", KINDS)
def test_head_and_factors_of_a_complete_checkpoint_are_exported_and_peft_computes_the_same(kind, tmp_path):
    model = model_of(kind).eval()
    plain, before = copy.deepcopy(model), logits(model)
    adapted = AdaptedModel(model, Scaling(8.0), targets(model), head=head_modules(model, ()))
    adapter = moved(adapted)
    adapted.load_clients([adapter])
    own, tokenizer = logits(adapted.model), tiny_tokenizer("<unk>")
    to_peft(adapter, tmp_path, 0.0, "base", adapted, LABELS, tokenizer, "SEQ_CLS")
    assert_close(logits(peft.PeftModel.from_pretrained(plain, tmp_path)), own, rtol=1e-4, atol=1e-5)
    assert (own - before).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_of_the_head_moves_the_loss(kind):
    model = model_of(kind).eval()
    adapted = AdaptedModel(model, Scaling(8.0), targets(model), head=head_modules(model, ()))
    trained = adapted.load_clients([moved(adapted)], "w")
    ids = torch.tensor([[9, 8, 7, 3]])
    nn.functional.cross_entropy(adapted.model(input_ids=ids).logits, torch.tensor([1])).backward()
    assert len(trained) == len(adapted.spec.head) and all(x.grad is not None and x.grad.any() for x in trained)


@pytest.mark.parametrize("kind", ["bert", "bart", "t5", "deberta"])
def test_the_head_of_a_checkpoint_without_one_is_that_of_a_complete_one_and_a_missing_pooler(kind, tmp_path):
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = tiny_tokenizer("<unk>", "<s>", "</s>", "<pad>", append="</s>", **names)
    config = model_of(kind).config
    model, _, checkpoint = Classification().load(str(tiny_model(tmp_path, config, tokenizer)), LABELS, 0)
    assert head_modules(model, checkpoint.new) == head_modules(model, ())
    if kind == "bert":
        lost = [*checkpoint.new, "bert.pooler.dense.weight", "bert.pooler.dense.bias"]
        assert head_modules(model, lost) == ("bert.pooler", "classifier")


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"targets": "quer(y"}, r"lora.targets = 'quer\(y' is not a regular expression"),
        (
            {"targets": "no_such"},
            "lora.targets: 'no_such' matches no linear module; available: dense, key, query, value",
        ),
        ({"targets": ["query", "valeu"]}, "lora.targets: 'valeu' matches no linear module"),
        ({"targets": ["classifier"]}, "lora.targets: 'classifier' matches no linear module"),
        ({"targets": []}, "lora.targets: .* matches no linear module"),
        ({"rank_pattern": {"query": 2, "k(ey": 3}}, r"lora.rank_pattern: 'k\(ey' is not a regular expression"),
        ({"rank_pattern": {"query": 2, "key": 3}}, "lora.rank_pattern: 'key' matches no target module; .* query, value"),
    ],
)
def test_targets_and_patterns_that_match_nothing_are_refused_in_one_line(lora, message):
    model = model_of("bert")
    settings = Lora(**lora)
    with pytest.raises(UserError, match=message) as rejected:
        find_targets(model, settings.targets, settings.rank_pattern, head_modules(model, ()))
    assert "\n" not in str(rejected.value)


def test_ranks_above_the_size_of_a_module_are_refused_with_the_largest():
    sizes = {"wide": (16, 24), "narrow": (5, 24)}
    check_ranks(sizes, {"narrow": 5}, 16)
    with pytest.raises(UserError, match=r"method.rank = 6 is above the size of narrow, 5 x 24; choose at most 5"):
        check_ranks(sizes, {}, 6)
    with pytest.raises(UserError, match=r"lora.rank_pattern = 17 is above the size of wide"):
        check_ranks(sizes, {"wide": 17}, 4)


@pytest.mark.parametrize(
    "kind", fast(("bart", "bert", "gpt2", "llama", "modernbert", "roberta", "t5"), "bart", "bert", "t5")
)
def test_layers_are_those_of_pefts_layers_to_transform(kind):
    model = model_of(kind)
    wanted = sorted({n.rpartition(".")[2] for n in find_targets(model, targets(model), {}, head_modules(model, ())).sizes})
    own = find_targets(model, wanted, {}, head_modules(model, ()), layers=[1]).sizes
    config = peft.LoraConfig(target_modules=wanted, layers_to_transform=[1])
    twin = peft.get_peft_model(copy.deepcopy(model), config).base_model.model
    assert own.keys() == {n for n, m in twin.named_modules() if isinstance(m, BaseTunerLayer) and "lora_" not in n} != set()


def test_a_layer_without_targets_is_refused_with_those_that_have_some():
    model = model_of("bert")
    with pytest.raises(UserError, match=r"lora.layers: layer 2 has no target module; available: 0, 1$"):
        find_targets(model, None, {}, head_modules(model, ()), layers=[1, 2])
    with pytest.raises(UserError, match=r"lora.layers = \[\]: expected at least one layer"):
        find_targets(model, None, {}, head_modules(model, ()), layers=[])


@pytest.mark.parametrize("rslora", [False, True])
def test_alphas_of_single_modules_are_exported_and_peft_computes_the_same(rslora, tmp_path):
    model = model_of("bert").eval()
    plain, pattern = copy.deepcopy(model), {"layer.0.attention.self.query": 64.0, "value": 2.0}
    head = head_modules(model, ())
    adapted = AdaptedModel(model, Scaling(8.0, rslora), head=head, alpha_pattern=pattern)
    name = "bert.encoder.layer.0.attention.self.query"
    assert adapted.spec.scale(name, 4) == 8 * adapted.spec.scale(name.replace("layer.0", "layer.1"), 4)
    assert adapted.spec.scale(name, 4) == 32 * adapted.spec.scale(name.replace("query", "value"), 4)
    adapter = moved(adapted)
    adapted.load_clients([adapter])
    to_peft(adapter, tmp_path, 0.0, "base", adapted, LABELS, tiny_tokenizer("<unk>"), "SEQ_CLS")
    own = logits(adapted.model)
    assert_close(logits(peft.PeftModel.from_pretrained(plain, tmp_path)), own, rtol=1e-4, atol=1e-5)


def test_pefts_default_targets_are_read_once_for_each_version_of_peft(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    known = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    found = [_peft_targets()]
    monkeypatch.setattr(peft.utils.constants, "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", {"bert": ["key"]})
    found.append(_peft_targets())
    monkeypatch.setattr("fedlora.models.targets.version", lambda _: "another")
    assert found == [known, known] and _peft_targets() == {"bert": ["key"]}
