"""Adapters for servers: factors of one rank and scale for all modules of a name."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from fedlora.adapter import Adapter
from fedlora.exporting.one_rank import unfit_for_one_rank
from fedlora.exporting.serving import to_serving
from fedlora.exporting.write import to_peft
from fedlora.linalg.lowrank import LowRank
from fedlora.models.adapted import AdaptedModel, Scaling
from fedlora.parts.dense import Dense
from fedlora.parts.heads import Heads
from tiny_gguf import tiny_gguf, tokenizer_of
from tiny_images import tiny_vit
from tiny_seq2seq import tiny_seq2seq

from tiny import tiny_bert

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")

TARGETS = {
    "llama": r".*layers\.0.*(q_proj|down_proj)|.*1.*v_proj",
    "qwen2": r".*layers\.1.*(k_proj|gate_proj)",
    "gpt2": r".*(0\.attn\.c_attn|1\.attn\.c_proj)",
    "bert": r".*(query|1\.intermediate\.dense)",
    "t5": r".*decoder.*(q|v|wo)",
    "vit": r".*0.*(query|value|q_proj|v_proj)",
}
"""Some modules of a name, in layers of their own."""


def base(kind: str, folder: Path) -> tuple[Any, Any]:
    """The class of a model that has no head for a task, and the written model."""
    match kind:
        case "bert":
            return transformers.AutoModel, tiny_bert(folder, dropout=0.0)
        case "t5":
            return transformers.AutoModelForSeq2SeqLM, tiny_seq2seq(folder, "t5")
        case "vit":
            return transformers.AutoModel, tiny_vit(folder)
    return transformers.AutoModelForCausalLM, tiny_gguf(folder, kind)


def outputs(kind: str, model: Any) -> Tensor:
    ids = torch.randint(4, 30, (2, 7), generator=torch.Generator().manual_seed(0))
    size = getattr(model.config, "image_size", 0)
    inputs = {"input_ids": ids}
    if kind == "t5":
        inputs |= {"decoder_input_ids": ids}
    if kind == "vit":
        inputs = {"pixel_values": torch.randn(2, model.config.num_channels, size, size, generator=torch.Generator())}
    with torch.no_grad():
        found: Tensor = model.eval()(**inputs)[0]
    return found


def adapter_of(adapted: AdaptedModel) -> Adapter:
    """Random parts of unequal ranks, and one of several heads."""
    random, found = torch.Generator().manual_seed(0), {}
    for i, (name, (out, in_)) in enumerate(adapted.spec.modules.items()):
        rank = 2 * (1 + i % 3)
        b, a = torch.randn(out, rank, generator=random), torch.randn(rank, in_, generator=random)
        heads = Heads(b=b, c=torch.randn(2, rank // 2, rank // 2, generator=random), s=torch.ones(2), a=a)
        found[name] = heads if i % 3 == 1 else LowRank(b=b, a=a)
    return found


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", TARGETS)
def test_both_peft_folders_compute_what_the_adapter_computes(kind, rslora, tmp_path):
    make, folder = base(kind, tmp_path / "base")
    adapted = AdaptedModel(make.from_pretrained(folder), Scaling(6.0, rslora), TARGETS[kind])
    adapter = adapter_of(adapted)
    before = outputs(kind, adapted.model)
    adapted.load_clients([adapter])
    own = outputs(kind, adapted.model)
    assert (own - before).abs().max() > 1e-3 and unfit_for_one_rank(adapter, adapted) is None
    for form, write in (("adapter", to_peft), ("serving", to_serving)):
        write(adapter, tmp_path / form, 0.1, str(folder), adapted, (), tokenizer_of("gpt2"), None)
        loaded = peft.PeftModel.from_pretrained(make.from_pretrained(folder), tmp_path / form)
        assert_close(outputs(kind, loaded), own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", TARGETS)
def test_a_served_adapter_has_one_rank_alpha_equal_to_it_and_factors_for_all_modules_of_a_name(kind, tmp_path):
    make, folder = base(kind, tmp_path / "base")
    model = make.from_pretrained(folder)
    linear = {n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    adapted = AdaptedModel(model, Scaling(6.0, True), TARGETS[kind])
    adapter = adapter_of(adapted)
    rank = max(part.rank for part in adapter.values())
    to_serving(adapter, tmp_path / "out", 0.0, "base", adapted, (), tokenizer_of("gpt2"), None)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == rank
    assert not (config["use_rslora"] or config["rank_pattern"] or config["alpha_pattern"] or config["modules_to_save"])
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {x.shape[0] for key, x in tensors.items() if "lora_A" in key} == {rank}
    named = {key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for key in tensors if "lora_A" in key}
    targets = {name.rpartition(".")[2] for name in adapted.spec.modules}
    assert named == {name for name in linear if name.rpartition(".")[2] in targets}
    assert named > adapted.spec.modules.keys() and targets == set(config["target_modules"])
    assert all(not x.any() for key, x in tensors.items() if not any(name in key for name in adapted.spec.modules))


def test_a_trained_head_is_rejected_with_its_name(tmp_path):
    _, folder = base("bert", tmp_path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    adapted = AdaptedModel(model, Scaling(6.0), ["query"], head=["classifier"])
    head = {name: Dense(x) for name, x in adapted.spec.head.items()}
    reason = unfit_for_one_rank({**adapter_of(adapted), **head}, adapted)
    assert reason is not None and "classifier.weight and 1 more are not LoRA factors" in reason
