"""Clipped sums against Opacus on the same PEFT model; needs `pip install opacus`."""

import copy
import warnings

import peft
import pytest
import torch
import transformers
from torch.nn import functional

from fedlora.adapter import lora_init, pack
from fedlora.linalg.lowrank import LowRank
from fedlora.models.adapted import AdaptedModel, Scaling
from fedlora.models.targets import head_modules
from fedlora.parts.dense import Dense
from fedlora.train.per_example import add_clipped

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    opacus = pytest.importorskip("opacus")
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's and Opacus's

WIDE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
CONFIGS = {
    "bert": transformers.BertConfig(vocab_size=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **WIDE),
    "llama": transformers.LlamaConfig(vocab_size=40, num_key_value_heads=2, pad_token_id=0, **WIDE),
}


@pytest.mark.parametrize("clip", [1e-3, 0.5, 1e3])
@pytest.mark.parametrize("kind", CONFIGS)
def test_clipped_sums_are_those_of_opacus(kind, clip):
    """All tensors, the head included, in fp64; examples of unequal lengths."""
    config = copy.deepcopy(CONFIGS[kind])
    config.num_labels = 3
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config).double()
    adapted = AdaptedModel(copy.deepcopy(model), Scaling(8.0), head=head_modules(model, ()), precision=torch.float64)
    start = {n: LowRank(torch.randn_like(p.b).double(), p.a.double()) for n, p in lora_init(adapted.spec, 4, 0).items()}
    start |= {name: Dense(w.double()) for name, w in adapted.spec.head.items()}
    ids, labels = torch.randint(1, 40, (5, 6)), torch.tensor([0, 2, 1, 1, 0])
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(6) < torch.tensor([6, 3, 4, 6, 2])[:, None]).long()}

    keys = [key for key in pack(start)]
    parameters = dict(zip(keys, adapted.load_clients([start], "baw"), strict=True))
    places = torch.zeros(5, dtype=torch.long)
    with adapted.client_layout.each_example(places) as gradients:
        functional.cross_entropy(adapted.model.train()(**inputs).logits, labels, reduction="sum").backward()
        each = {key: gradients.of(x) for key, x in parameters.items()}
    sums = {key: torch.zeros_like(x) for key, x in parameters.items()}
    add_clipped(sums, each, places, torch.tensor([clip], dtype=torch.float64))

    twin = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8))
    trained = {}
    for name, part in start.items():
        if isinstance(part, LowRank):
            layer = twin.base_model.model.get_submodule(name)
            trained[f"{name}.a"], trained[f"{name}.b"] = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            trained[f"{name}.a"].data.copy_(part.a)
            trained[f"{name}.b"].data.copy_(part.b / layer.scaling["default"])
        else:
            module, _, parameter = name.rpartition(".")
            head = twin.base_model.model.get_submodule(module).modules_to_save["default"]
            trained[f"{name}.w"] = getattr(head, parameter)
            trained[f"{name}.w"].data.copy_(part.w)
    wrapped = GradSampleModule(twin.train(), loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(trained.values(), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=clip,
        expected_batch_size=5,
        loss_reduction="sum",
    )
    functional.cross_entropy(wrapped(**inputs).logits, labels, reduction="sum").backward()
    optimizer.clip_and_accumulate()
    assert trained.keys() == sums.keys()
    for key, x in trained.items():
        assert (sums[key][0] - x.summed_grad).norm() <= 1e-6 * x.summed_grad.norm()
