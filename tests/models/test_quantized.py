"""Quantized bases against dense ones with the rounded weights, and against bitsandbytes' own layers."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from fedlora import evaluate
from fedlora.adapter import lora_init
from fedlora.api import export, resume, run
from fedlora.config.experiment import Experiment
from fedlora.errors import UserError
from fedlora.federated_data import FederatedData
from fedlora.linalg.lowrank import LowRank
from fedlora.models.adapted import AdaptedModel, Scaling
from fedlora.models.quantized import QuantizedLinear, quantizable, quantize, round_weights
from fedlora.session import Session
from test_export import in_transformers, own_logits
from tiny_gguf import tiny_gguf
from tiny_lm import pair_rows
from tiny_tasks import tiny_task

from architectures import model_of

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

KINDS = ("nf4", "int8")
SIZES = {
    "linear": lambda: nn.Linear(96, 160),
    "transposed": lambda: Conv1D(160, 96),
    "no bias": lambda: nn.Linear(96, 7, False),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_quantized_layer_is_the_dense_one_with_the_rounded_weight(kind, size, dtype):
    layer = SIZES[size]()
    quantized, x = QuantizedLinear(layer, kind), torch.randn(2, 5, 96, dtype=dtype, requires_grad=True)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    found, expected = quantized(x), functional.linear(x, quantized.weight.to(dtype), bias)
    slope = torch.randn_like(found)
    assert_close(found, expected, rtol=1e-5, atol=1e-5)
    (ours,), (theirs,) = (torch.autograd.grad(y, x, slope) for y in (found, expected))
    assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert_close(quantized(x[1, 3])[None], found[1, 3:4], rtol=1e-5, atol=1e-5)


def test_the_weights_are_those_of_bitsandbytes():
    weight = torch.randn(96, 128)
    four = bnb.nn.Linear4bit(128, 96, bias=False, quant_type="nf4", compress_statistics=True)
    four.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
    four.to("cpu")
    expected = bnb.functional.dequantize_4bit(four.weight.data, four.weight.quant_state)
    layer = nn.Linear(128, 96, bias=False)
    layer.weight.data.copy_(weight)
    assert torch.equal(QuantizedLinear(layer, "nf4").weight, expected)
    stored, largest, _ = bnb.functional.int8_vectorwise_quant(weight.half())
    assert_close(QuantizedLinear(layer, "int8").weight, bnb.functional.int8_vectorwise_dequant(stored, largest))


def test_four_bits_round_normal_weights_by_nine_percent_of_their_norm_and_eight_by_less_than_one():
    layer = nn.Linear(512, 512)
    nn.init.normal_(layer.weight)
    weight, rounded = layer.weight.detach(), {kind: QuantizedLinear(layer, kind).weight for kind in KINDS}
    errors = {kind: float((one - weight).norm() / weight.norm()) for kind, one in rounded.items()}
    assert errors["nf4"] == pytest.approx(0.092, abs=0.004) and errors["int8"] < 0.01


def test_a_note_has_the_memory_of_the_weights():
    """nf4: half a byte for each weight, one for 64 of them, and four for 64 x 256 of them."""
    note, weights = quantize(model_of("bert"), "nf4", ["classifier"]), 2 * (4 * 32 * 32 + 2 * 32 * 48) + 32 * 32
    assert f"13 linear modules take {weights * (1 / 2 + 1 / 64) / 1e6:.3f} MB" in note
    assert f"instead of {4 * weights / 1e6:.3f} MB in fp32" in note


def test_a_copy_and_a_cast_of_a_quantized_layer_compute_the_same():
    layer, x = QuantizedLinear(nn.Linear(96, 64), "nf4"), torch.randn(3, 96)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    expected = layer.weight
    assert torch.equal(layer.to(torch.bfloat16).weight, expected)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@every_kind
def test_base_updates_beside_a_quantized_base_are_not_rounded(kind):
    model = model_of("bert")
    quantize(model, kind, ["classifier"])
    adapted = AdaptedModel(model, Scaling(16.0), head=["classifier"])
    stored = {n: x.clone() for n, x in model.named_parameters() if n.endswith(".quantized")}
    small = {
        name: LowRank(1e-4 * torch.randn(part.b.shape), part.a) for name, part in lora_init(adapted.spec, 2, 0).items()
    }
    for _ in range(3):
        adapted.merge_into_base(small)
    adapted.load_clients([])
    for name, layer in adapted.layers.items():
        x = torch.randn(4, adapted.spec.modules[name][1])
        update = layer(x) - layer.base(x)
        assert_close(update, 3 * x @ small[name].product().mT, rtol=1e-2, atol=1e-5)
        assert_close(adapted.spec.weight(name), layer.base.weight)
    assert stored and all(torch.equal(x, dict(model.named_parameters())[n]) for n, x in stored.items())


def experiment(tmp_path: Path, task: str = "classification", **settings: Any) -> Experiment:
    given = tiny_task(task, tmp_path / task)
    train = {"lr": 0.02, "max_steps": 2, "max_length": 32}
    return Experiment.model_validate(
        {"rounds": 2, "seed": 3, "clients": {"count": 3, "partition": "iid"}, **given, "train": train, **settings}
    )


@pytest.mark.parametrize(("kind", "method"), [("nf4", "fedex-lora"), ("nf4", "frlora"), ("int8", "flora")])
def test_a_run_on_a_quantized_base_resumes_to_the_bit_and_is_exported(kind, method, tmp_path):
    """Methods that change the base, or begin with its weights."""
    settings = experiment(tmp_path, quantize=kind, method={"name": method, "rank": 4})
    whole = run(settings, tmp_path / "whole")
    assert json.loads((whole.folder / "environment.json").read_text())["clients_per_step"] == 16
    assert any((whole.folder / "base_updates").iterdir())
    run(settings.model_copy(update={"rounds": 1}), tmp_path / "half")
    resumed = resume(tmp_path / "half", overrides=["rounds=2"])
    files = [load_file(one.folder / "adapter" / "adapter_model.safetensors") for one in (whole, resumed)]
    assert all(torch.equal(files[1][key], x) for key, x in files[0].items())
    assert evaluate(whole.folder) == whole.rows[-1].global_
    scores = [evaluate(path, settings.data.source) for path in (whole.folder, whole.folder / "adapter")]
    assert scores[1]["loss"] == pytest.approx(scores[0]["loss"], rel=1e-4)
    own = own_logits(whole.folder)[""]
    export(whole.folder, "merged", tmp_path / "merged")
    assert_close(in_transformers(tmp_path / "merged"), own, rtol=1e-4, atol=1e-4)
    assert f"quantized to {kind} by bitsandbytes" in (whole.folder / "adapter" / "README.md").read_text()


@pytest.mark.filterwarnings("ignore")  # of bitsandbytes, and of transformers' loader for it
def test_the_code_in_the_adapters_readme_quantizes_the_same_modules_to_the_same_weights(tmp_path, monkeypatch):
    settings = experiment(tmp_path, quantize="nf4", rounds=1)
    folder = run(settings, tmp_path / "run").folder
    session = Session.make(settings, FederatedData.make(settings))
    monkeypatch.chdir(folder / "adapter")
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "adapter" / "README.md").read_text(), re.DOTALL)
    exec(code, found := dict[str, Any]())
    loaded = {n: m.weight for n, m in found["model"].named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    loaded = {n.replace("base_model.model.", "").replace(".base_layer", ""): w for n, w in loaded.items()}
    own = {
        n.replace(".base", ""): m.weight for n, m in session.adapted.model.named_modules() if isinstance(m, QuantizedLinear)
    }
    assert loaded.keys() == own.keys()
    for name, weight in loaded.items():
        if not hasattr(weight.quant_state, "original_dtype"):  # not yet packed for a kernel
            assert_close(bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float(), own[name])


def test_the_readme_of_an_adapter_on_a_quantized_gguf_file_says_that_its_code_does_not_quantize(tmp_path):
    pytest.importorskip("gguf")
    base, rows = tiny_gguf(tmp_path / "base", "llama"), pair_rows(tmp_path / "rows.jsonl", 24)
    data = {"source": str(rows), "prompt": "prompt", "response": "response"}
    clients = {"count": 2, "partition": "iid"}
    begin = Experiment.model_validate(
        {"model": str(base), "task": "causal-lm", "data": data, "clients": clients, "rounds": 1}
    )
    export(run(begin, tmp_path / "begin").folder, "gguf-merged", tmp_path / "gguf")
    file = str(tmp_path / "gguf" / "model.gguf")
    folder = run(begin.model_copy(update={"model": file, "quantize": "nf4"}), tmp_path / "run").folder
    card = (folder / "adapter" / "README.md").read_text()
    assert "quantized to nf4 by bitsandbytes, which the code below does not do" in card and "gguf_file='model.gguf'" in card
    scores = [evaluate(path, str(rows))["loss"] for path in (folder, folder / "adapter")]
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)  # quantized as in training
    export(folder, "merged", tmp_path / "merged")
    assert evaluate(tmp_path / "merged", str(rows))["loss"] == pytest.approx(scores[0], rel=1e-4)


@pytest.mark.parametrize("task", ["causal-lm", "seq2seq"])
def test_other_models_are_quantized_checkpointed_and_trained_together(task, tmp_path):
    settings = experiment(tmp_path, task, quantize="nf4")
    train = settings.train.model_copy(update={"gradient_checkpointing": True})
    settings = settings.model_copy(update={"train": train})
    session = Session.make(settings, FederatedData.make(settings))
    modules = [n for n, m in session.adapted.model.named_modules() if isinstance(m, QuantizedLinear)]
    assert modules and not any("lm_head" in name or name.endswith((".wo", ".wo.base")) for name in modules)
    assert session.trainer.clients_per_step == 16
    (note,) = [note for note in session.notes if note.startswith("quantize = 'nf4': the weights of ")]
    assert "MB in fp32" in note


def test_rounded_weights_are_those_of_the_quantized_model():
    one, other = model_of("gpt2"), model_of("gpt2")
    quantize(one, "nf4", ["score"])
    round_weights(other, "nf4", ["score"])
    ids = torch.randint(4, 128, (2, 6))
    assert_close(one.eval()(input_ids=ids).logits, other.eval()(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    assert not torch.equal(other.transformer.h[0].attn.c_attn.weight, model_of("gpt2").transformer.h[0].attn.c_attn.weight)


@pytest.mark.slow
def test_bitsandbytes_is_imported_without_a_word():
    code = "from fedlora.models.loading import quiet; quiet(); import bitsandbytes"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_what_cannot_be_quantized_is_refused_in_one_line(tmp_path):
    model = model_of("bert")
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(UserError, match=r"^quantize = 'nf4': the model is already quantized; remove the setting$"):
        quantizable(model, "nf4", ())
    with pytest.raises(UserError, match=r"quantize = 'nf4': not supported by method.scope = 'all'"):
        experiment(tmp_path, quantize="nf4", method={"name": "full-ft", "scope": "all"})
