"""Each form of a run's export computes what the run's own view computes."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor
from torch.testing import assert_close

from fedlora import Experiment, evaluate, run
from fedlora.api import export
from fedlora.errors import UserError
from fedlora.federated_data import FederatedData
from fedlora.runs.start import opened, read_folder
from fedlora.session import Session
from tiny_gguf import tiny_gguf
from tiny_lm import pair_rows

from tiny import tiny_bert, tiny_rows

gguf = pytest.importorskip("gguf")

LORA = {"alpha": 7.0, "rslora": True, "targets": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"0.*q_proj": 3}}
"""With unequal ranks."""
FLORA = {"method": {"name": "flora", "rank": 2}, "lora": LORA}
"""Has base updates, too."""
TEXTS = ["babbad 12 cecd", "dif fol"]

Run = Callable[..., Path]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Run:
    """Makes a run of a language model, or gives the one made before, and returns its folder."""
    place, made = tmp_path_factory.mktemp("forms"), {}
    rows, model = pair_rows(place / "rows.jsonl", 24), tiny_gguf(place / "llama", "llama")

    def make(**tables: Any) -> Path:
        if (key := json.dumps(tables)) not in made:
            data = {"source": str(rows), "prompt": "prompt", "response": "response"}
            settings = {"clients": {"count": 2, "partition": "iid"}, "train": {"lr": 0.05, "batch_size": 4}, "rounds": 2}
            given = {"task": "causal-lm", "model": str(model), "data": data, **settings, **tables}
            made[key] = run(Experiment.model_validate(given), place / f"run {len(made)}", progress=False).folder
        return made[key]

    return make


def logits(model: Any, tokenizer: Any) -> list[Tensor]:
    with torch.no_grad():
        return [model.eval()(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS]


def own(folder: Path, client: str = "") -> list[Tensor]:
    """What the run's view computes."""
    with opened(folder) as (run_folder, experiment):
        done, server = run_folder.restore()
        session = Session.make(experiment, FederatedData.make(experiment))
        session.adapted.load_clients([session.adapters(server, run_folder, done)[client]])
        return logits(session.adapted.model, session.tokenizer)


def tokenizer_in(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def in_gguf(folder: Path) -> list[Tensor]:
    where = {"gguf_file": "model.gguf"}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **where, dtype=torch.float32)
    return logits(model, transformers.AutoTokenizer.from_pretrained(folder, **where))


@pytest.mark.parametrize("form", ["adapter", "serving", "merged", "gguf-merged"])
def test_a_run_with_base_updates_and_unequal_ranks_computes_the_same_in_every_form(form, finished, tmp_path):
    folder, out = finished(**FLORA), tmp_path / "out"
    assert export(folder, form, out) == {"": out}
    match form:
        case "gguf-merged":
            found = in_gguf(out)
        case "merged":
            found = logits(transformers.AutoModelForCausalLM.from_pretrained(out), tokenizer_in(out))
        case _:
            found = logits(peft.AutoPeftModelForCausalLM.from_pretrained(out), tokenizer_in(out))
    assert_close(found, own(folder), rtol=1e-4, atol=1e-5)
    begin = transformers.AutoModelForCausalLM.from_pretrained(_model_of(folder))
    assert (found[0] - logits(begin, tokenizer_in(_model_of(folder)))[0]).abs().max() > 1e-3


def _model_of(folder: Path) -> str:
    with opened(folder) as (_, experiment):
        return experiment.model


def test_the_base_with_the_adapters_file_is_the_merged_file(finished, tmp_path):
    folder = finished(**FLORA)
    for form in ("gguf-adapter", "gguf-merged"):
        export(folder, form, tmp_path / form)
    read = {one.name: one.data for one in gguf.GGUFReader(tmp_path / "gguf-merged" / "model.gguf").tensors}
    lora = {one.name: one.data for one in gguf.GGUFReader(tmp_path / "gguf-adapter" / "adapter.gguf").tensors}
    adapted = {name.removesuffix(".lora_a") for name in lora if name.endswith(".lora_a")}
    assert adapted == {f"blk.{i}.{name}.weight" for i in range(2) for name in ("attn_q", "attn_v", "ffn_down")}
    base = transformers.AutoModelForCausalLM.from_pretrained(_model_of(folder)).state_dict()
    delta = torch.from_numpy(lora["blk.1.ffn_down.weight.lora_b"] @ lora["blk.1.ffn_down.weight.lora_a"])
    merged = torch.from_numpy(read["blk.1.ffn_down.weight"].copy())
    assert_close(base["model.layers.1.mlp.down_proj.weight"] + delta, merged, rtol=1e-5, atol=1e-6)


def test_a_run_on_a_gguf_file_is_merged_into_a_gguf_file_and_a_folder(finished, tmp_path):
    export(finished(**FLORA), "gguf-merged", tmp_path / "base")
    folder = finished(model=str(tmp_path / "base" / "model.gguf"))
    expected = own(folder)
    export(folder, "gguf-merged", tmp_path / "file")
    export(folder, "merged", tmp_path / "folder")
    assert_close(in_gguf(tmp_path / "file"), expected, rtol=1e-4, atol=1e-5)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert_close(logits(merged, tokenizer_in(tmp_path / "folder")), expected, rtol=1e-4, atol=1e-5)


def test_a_merged_gguf_file_and_its_folder_are_evaluated_as_the_run_without_any_setting(finished, tmp_path):
    folder = finished(**FLORA)
    rows, out = read_folder(folder).data.source, tmp_path / "out"
    export(folder, "gguf-merged", out)
    expected = pytest.approx(evaluate(folder, rows), rel=1e-4)
    assert evaluate(out, rows) == expected and evaluate(out / "model.gguf", rows) == expected


def test_an_adapter_for_llama_cpp_is_rejected_with_what_to_use(finished, tmp_path):
    export(finished(**FLORA), "gguf-adapter", tmp_path / "out")
    for path in (tmp_path / "out", tmp_path / "out" / "adapter.gguf"):
        with pytest.raises(
            UserError, match=r"in a GGUF file is for llama\.cpp only; use the run directory, or .* --to adapter"
        ):
            evaluate(path, "other.jsonl")


def test_a_run_with_dora_is_merged_into_a_gguf_file(finished, tmp_path):
    folder = finished(lora={**LORA, "dora": True})
    export(folder, "gguf-merged", tmp_path / "out")
    assert_close(in_gguf(tmp_path / "out"), own(folder), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="DoRA's magnitudes"):
        export(folder, "gguf-adapter", tmp_path / "adapter")


def test_each_client_of_a_personal_method_has_an_adapter_file_and_one_is_merged(finished, tmp_path):
    folder = finished(method={"name": "fedsa-lora", "rank": 2})
    written = export(folder, "gguf-adapter", tmp_path / "files")
    assert sorted(written) == ["000", "001"]
    assert all((path / "adapter.gguf").stat().st_size > 0 for path in written.values())
    with pytest.raises(UserError, match="choose one with --client"):
        export(folder, "gguf-merged", tmp_path / "merged")
    export(folder, "gguf-merged", tmp_path / "merged", client="001")
    assert_close(in_gguf(tmp_path / "merged"), own(folder, "001"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["merged", "gguf-merged"])
def test_a_whole_model_has_the_chosen_data_type(form, finished, tmp_path):
    export(finished(**FLORA), form, tmp_path / "out", dtype="bf16")
    if form == "merged":
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert {x.dtype for x in model.parameters()} == {torch.bfloat16}
    else:
        types = {
            one.tensor_type.name for one in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors if len(one.shape) > 1
        }
        assert types == {"BF16"}


def test_a_weight_beyond_the_range_of_the_data_type_is_rejected(finished, tmp_path):
    huge = tmp_path / "huge"
    model = transformers.AutoModelForCausalLM.from_pretrained(_model_of(finished(**FLORA)))
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e6
    model.save_pretrained(huge)
    tokenizer_in(Path(_model_of(finished(**FLORA)))).save_pretrained(huge)
    folder = finished(model=str(huge))
    with pytest.raises(
        UserError, match=r"lm_head.weight has a weight beyond the range of torch.float16; choose .* bf16 or"
    ):
        export(folder, "merged", tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()


def test_an_adapter_has_no_data_type_to_choose(finished, tmp_path):
    with pytest.raises(UserError, match="dtype = 'bf16': adapters are written in fp32"):
        export(finished(**FLORA), "serving", tmp_path / "out", dtype="bf16")


@pytest.mark.parametrize("form", ["serving", "gguf-adapter", "gguf-merged"])
def test_a_classifier_has_no_form_without_its_head(form, tmp_path):
    given = {"model": str(tiny_bert(tmp_path / "bert")), "data": str(tiny_rows(tmp_path / "rows.jsonl", 30)), "rounds": 1}
    folder = run(Experiment.model_validate({**given, "clients": {"count": 2}}), tmp_path / "run", progress=False).folder
    reason = "models of type 'bert' are not exported to GGUF" if form == "gguf-merged" else "are not LoRA factors"
    with pytest.raises(UserError, match=f"the adapter cannot be exported: .*{reason}"):
        export(folder, form, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_the_package_gguf_the_error_names_the_extra(finished, tmp_path, monkeypatch):
    folder, find = finished(**FLORA), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "gguf" else find(name, *more))
    with pytest.raises(UserError, match=r"gguf-adapter: .*pip install 'fedlora\[gguf\]'"):
        export(folder, "gguf-adapter", tmp_path / "out")
