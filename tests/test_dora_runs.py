"""Whole runs with DoRA: what they send, resume, export and refuse."""

from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import Tensor
from torch.testing import assert_close

from fedlora import UserError, evaluate, predict, resume, run
from fedlora.api import export
from fedlora.config.experiment import build
from fedlora.methods.table import TABLE
from fedlora.parts.dora import Dora
from fedlora.rounds.codec import encoded_size
from fedlora.runs.folder import RunFolder
from fedlora.runs.start import opened
from fedlora.saved_adapter import SavedAdapter
from tiers import fast

from tiny import LABELS, WORDS
from wired import assert_same_runs, furnish, problem

ABLE = [name for name, row in TABLE.items() if row.magnitudes]
TEXTS = [" ".join(WORDS[i : i + 3 + i % 4]) for i in range(0, 60, 10)]
PATTERN = {"alpha": 7.0, "rslora": True, "rank_pattern": {r"layer\.0\..*\.query": 3}}
"""With unequal ranks."""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return furnish(tmp_path_factory.mktemp("dora"))


def experiment(home: Path, method: str, *overrides: str):
    """Clients of unequal sizes, half of which take part in a round."""
    given = problem(home, method, lora={"dora": True, **PATTERN}, sampling={"fraction": 0.5})
    clients = {"count": 4, "partition": "dirichlet", "alpha": 1.0}
    return build({**given, "clients": clients}, ["train.lr=0.05", *overrides])


def logits(model: torch.nn.Module, tokenizer: object) -> Tensor:
    with torch.no_grad():
        return model.eval()(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits


def own_logits(folder: Path, client: str | None = None) -> Tensor:
    loaded = SavedAdapter.find(folder, client).load()
    assert {type(part) for part in loaded.adapter.values() if not part.in_head} == {Dora}
    loaded.adapted.load_clients([loaded.adapter])
    return logits(loaded.adapted.model, loaded.tokenizer)


@pytest.mark.parametrize("name", fast(ABLE, "hetlora", "fedsa-lora"))
def test_a_run_resumes_bit_for_bit_and_computes_the_same_in_peft_and_merged(name, home, tmp_path):
    whole = run(experiment(home, name), tmp_path / "whole", progress=False)
    run(experiment(home, name, "rounds=1"), tmp_path / "halves", progress=False)
    resume(tmp_path / "halves", overrides=["rounds=3"], progress=False)
    assert_same_runs(tmp_path / "whole", tmp_path / "halves")
    client, adapter = next(iter(whole.adapters.items()))
    own = own_logits(whole.folder, client or None)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(home / "bert", num_labels=len(LABELS))
    tokenizer = transformers.AutoTokenizer.from_pretrained(adapter)
    start = logits(model, tokenizer)
    assert_close(logits(peft.PeftModel.from_pretrained(model, adapter), tokenizer), own, rtol=1e-5, atol=1e-5)
    assert (own - start).abs().max() > 1e-2
    export(whole.folder, "merged", tmp_path / "merged", client or None)
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert_close(logits(merged, tokenizer), own, rtol=1e-5, atol=1e-5)
    for form in ("serving", "gguf-adapter"):
        with pytest.raises(UserError, match=r"DoRA's magnitudes, which vLLM, .*; export a merged model \(merged, gguf"):
            export(whole.folder, form, tmp_path / form, client or None)


def test_a_run_its_adapter_and_its_merged_model_are_evaluated_and_predict_the_same(trained):
    one = trained("causal-lm", "ffa-lora", lora={"dora": True})
    assert evaluate(one.run) == pytest.approx(one.result.rows[-1].global_, rel=0, abs=0)
    first, *others = [evaluate(path, one.data) for path in (one.run, one.adapter, one.merged)]
    for other in others:
        assert other == pytest.approx({name: first[name] for name in other}, rel=1e-4, abs=1e-6)
    answers = [predict(path, one.rows[:2]) for path in (one.run, one.adapter)]
    assert answers[0] == answers[1]


def test_uploads_and_downloads_have_the_magnitudes_in_the_rounds_that_train_b(home, tmp_path):
    given = experiment(home, "rolora", "evaluate.clients=none", "method.head=frozen")
    result = run(given, tmp_path / "run", progress=False)
    with opened(tmp_path / "run") as (folder, _):
        assert isinstance(folder, RunFolder)
        state = folder.restore()[1].server.inner
    b, a = ({k: x for k, x in state.inner.items() if k.endswith(f".{factor}")} for factor in "ba")
    m = {f"magnitude/{name}": x for name, x in state.magnitudes.items()}
    assert b.keys() == {f"{name}.b" for name in state.magnitudes}
    for row in result.rows[1:]:
        up = {**b, **m} if row.round % 2 else a
        assert {one.bytes_up for one in row.per_client.values()} == {encoded_size(up)}
        assert {one.bytes_down for one in row.per_client.values()} == {encoded_size({**state.inner, **m})}


@pytest.mark.parametrize("name", [name for name in TABLE if name not in ABLE])
def test_other_methods_are_rejected_with_the_reason(name):
    with pytest.raises(UserError, match=f"lora.dora is not supported by {name}, .*; methods that support it: fedit, "):
        build({"method": {"name": name}, "lora": {"dora": True}})


def test_initial_factors_that_change_the_base_are_rejected():
    with pytest.raises(UserError, match=r"lora.dora needs lora.init = 'uniform' or 'gaussian'"):
        build({"lora": {"dora": True, "init": "pissa"}})
    assert build({"lora": {"dora": True, "init": "gaussian"}}).lora.dora
