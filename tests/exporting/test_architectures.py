"""Runs on six architectures compute the same from their exports, as others load them: PEFT, transformers, GGUF."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_serving import outputs
from torch import Tensor
from torch.testing import assert_close

from fedlora import Experiment, run
from fedlora.api import export
from fedlora.federated_data import FederatedData
from fedlora.runs.start import opened
from fedlora.session import Session
from tiers import fast
from tiny_gguf import tiny_gguf
from tiny_tasks import tiny_task

TASKS = {
    "llama": "causal-lm",
    "qwen2": "causal-lm",
    "gpt2": "causal-lm",
    "bert": "classification",
    "t5": "seq2seq",
    "vit": "image-classification",
}
"""By architecture."""
DECODERS = ("llama", "qwen2", "gpt2")
HEADS = ("bert", "vit")
RUNS: dict[str, dict[str, Any]] = {
    "plain": {"lora": {"alpha": 7.0}},
    "combined": {
        "lora": {"alpha": 7.0, "rslora": True, "rank_pattern": {r".*\.0\..*": 3}},
        "method": {"name": "fedex-lora", "rank": 2},
    },
}
"""LoRA; rsLoRA with a rank pattern and base updates."""
CASES = fast([(kind, name) for kind in TASKS for name in RUNS], ("gpt2", "combined"), ("vit", "combined"))
IN_GGUF = fast([(kind, name) for kind in DECODERS for name in RUNS], ("gpt2", "combined"))

Run = Callable[[str, str], tuple[Path, Tensor]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Run:
    """Makes a run, or gives the one made before: its folder, and what its model computes."""
    place, made = tmp_path_factory.mktemp("architectures"), {}

    def make(kind: str, name: str) -> tuple[Path, Tensor]:
        if (kind, name) not in made:
            home = place / f"{kind} {name}"
            given = tiny_task(TASKS[kind], home) | {"evaluate": {"before": False, "clients": "none"}}
            if kind in DECODERS:
                given["model"] = str(tiny_gguf(home / kind, kind))
                given["data"] = {"source": given["data"]["source"], "prompt": "prompt", "response": "response"}
            settings = {"clients": {"count": 2, "partition": "iid"}, "train": {"lr": 0.05, "max_steps": 2}, "rounds": 1}
            result = run(Experiment.model_validate({**given, **settings, **RUNS[name]}), home / "run", progress=False)
            made[kind, name] = result.folder, _own(kind, result.folder)
        return made[kind, name]

    return make


def _own(kind: str, folder: Path) -> Tensor:
    """What the run's model computes, which differs from what it computed before training."""
    with opened(folder) as (run_folder, experiment):
        done, state = run_folder.restore()
        session = Session.make(experiment, FederatedData.make(experiment))
        adapter = session.adapters(state, run_folder, done)[""]
    before = outputs(kind, session.adapted.model)
    session.adapted.load_clients([adapter])
    found = outputs(kind, session.adapted.model)
    assert (found - before).abs().max() > 1e-3
    assert bool(state.base_updates.rounds) == (experiment.method.name == "fedex-lora")
    assert any(part.in_head for part in adapter.values()) == (kind in HEADS)
    return found


def _by_its_card() -> tuple[str, Any]:
    """The code in the README of the working directory, and the model that it loads."""
    (code,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    exec(code, found := dict[str, Any]())
    return code, found["model"]


@pytest.mark.parametrize("case", CASES)
def test_the_code_in_the_readme_of_a_peft_folder_gives_the_runs_model(case, finished, tmp_path, monkeypatch):
    kind, (folder, own) = case[0], finished(*case)
    for form in ("adapter",) if kind in HEADS else ("adapter", "serving"):
        export(folder, form, tmp_path / form)
        monkeypatch.chdir(tmp_path / form)
        code, model = _by_its_card()
        assert kind == "vit" or "AutoPeftModelFor" in code
        assert_close(outputs(kind, model), own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_code_in_the_readme_of_a_merged_model_gives_the_runs_model(case, finished, tmp_path, monkeypatch):
    kind, (folder, own) = case[0], finished(*case)
    export(folder, "merged", tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    code, model = _by_its_card()
    assert "peft" not in code
    assert_close(outputs(kind, model), own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", IN_GGUF)
def test_a_merged_gguf_file_is_read_back_with_the_same_logits(case, finished, tmp_path):
    pytest.importorskip("gguf")
    kind, (folder, own) = case[0], finished(*case)
    export(folder, "gguf-merged", tmp_path / "out")
    file = {"gguf_file": "model.gguf", "dtype": torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", **file)
    assert_close(outputs(kind, model), own, rtol=1e-4, atol=1e-5)
