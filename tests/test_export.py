"""Exported adapters and models compute what the run's own view computes."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from fedlora import Experiment, resume, run
from fedlora.api import export
from fedlora.errors import UserError
from fedlora.exporting import write as export_module
from fedlora.federated_data import FederatedData
from fedlora.methods.table import TABLE
from fedlora.runs.start import opened, read_folder
from fedlora.session import Session
from tiers import fast

from tiny import LABELS, WORDS, tiny_bert, tiny_model, tiny_rows
from wired import assert_same_runs

TEXTS = [" ".join(WORDS[i : i + 3 + i % 4]) for i in range(0, 60, 10)]
PERSONAL = [name for name, row in TABLE.items() if row.personal]
COMMON = [name for name in TABLE if name not in PERSONAL]


Run = Callable[..., Path]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Run:
    """Makes a run of two rounds, or gives the one made before, and returns its folder."""
    place = tmp_path_factory.mktemp("export")
    rows, made = tiny_rows(place / "rows.jsonl", 45), {}

    def make(base: str = "bert", **tables: Any) -> Path:
        key = json.dumps([base, tables])
        if key not in made:
            model = place / base
            if not model.exists():
                BASES[base](model)
            settings: dict[str, Any] = {"clients": {"count": 2, "partition": "iid"}, "train": {"lr": 0.02}, **tables}
            given = {"model": str(model), "data": str(rows), "rounds": 2, "seed": 3, **settings}
            made[key] = run(Experiment.model_validate(given), place / f"run {len(made)}").folder
        return made[key]

    return make


def other_base(config: transformers.PretrainedConfig, **options: Any) -> Callable[[Path], None]:
    """Writes a model without a task head, with the tokenizer of `tiny_bert`."""

    def write(folder: Path) -> None:
        words = transformers.AutoTokenizer.from_pretrained(tiny_bert(folder)).backend_tokenizer
        names = {"unk_token": "[UNK]", "bos_token": "[CLS]", "eos_token": "[SEP]"}
        if config.model_type != "gpt2":
            names["pad_token"] = "[PAD]"
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, model_input_names=["input_ids", "attention_mask"], **names
        )
        for old in folder.iterdir():
            old.unlink()
        tokenizer.save_pretrained(folder)
        torch.manual_seed(0)
        transformers.AutoModel.from_config(config, **options).save_pretrained(folder)

    return write


def bert_with_head(folder: Path) -> None:
    config = transformers.BertConfig.from_pretrained(tiny_bert(folder), num_labels=3, problem_type="regression")
    tiny_model(folder, config, head=True)


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
IDS = {"vocab_size": 97, "bos_token_id": 2, "eos_token_id": 3}
BASES: dict[str, Callable[[Path], Any]] = {
    "bert": tiny_bert,
    "gpt2": other_base(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **IDS)),
    "distilbert": other_base(
        transformers.DistilBertConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=48, pad_token_id=0, vocab_size=97)
    ),
    "roberta": other_base(
        transformers.RobertaConfig(pad_token_id=0, max_position_embeddings=64, type_vocab_size=1, **SMALL, **IDS)
    ),
    "bert-with-head": bert_with_head,
    "bert-in-bf16": other_base(transformers.BertConfig(vocab_size=97, **SMALL), dtype=torch.bfloat16),
    "bert-without-pooler": other_base(transformers.BertConfig(vocab_size=97, **SMALL), add_pooling_layer=False),
}
LORA = {"distilbert": {"lora": {"targets": ["q_lin", "lin1"]}}}


def own_logits(folder: Path) -> dict[str, Tensor]:
    """What the run's own views compute: the global one under the empty name, or each client's."""
    with opened(folder) as (run_folder, experiment):
        done, server = run_folder.restore()
        session = Session.make(experiment, FederatedData.make(experiment))
        found = {}
        for client, adapter in session.adapters(server, run_folder, done).items():
            session.adapted.load_clients([adapter])
            found[client] = logits(session.adapted.model, session.tokenizer)
        return found


def logits(model: torch.nn.Module, tokenizer: Any, padded: bool = True) -> Tensor:
    """Of all texts in one batch, or of one at a time."""
    batches = [TEXTS] if padded else [[text] for text in TEXTS]
    with torch.no_grad():
        return torch.cat([model.eval()(**tokenizer(b, padding=padded, return_tensors="pt")).logits for b in batches])


def in_peft(folder: Path, adapter: Path) -> Tensor:
    """What a stranger gets who has the base model and the adapter's folder."""
    base = read_folder(folder).model
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(LABELS))
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    return logits(peft.PeftModel.from_pretrained(model, adapter), tokenizer, model.config.pad_token_id is not None)


def in_transformers(merged: Path) -> Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    return logits(transformers.AutoModelForSequenceClassification.from_pretrained(merged), tokenizer)


def by_its_card(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What the code in the folder's README gets."""
    monkeypatch.chdir(adapter)
    (code,) = re.findall(r"```python\n(.*?)```", (adapter / "README.md").read_text(), re.DOTALL)
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["model"].config.id2label == dict(enumerate(LABELS))
    return logits(found["model"], found["tokenizer"])


def untrained(folder: Path) -> Tensor:
    """What a base with the head of the run's seed computes."""
    with opened(folder) as (_, experiment):
        session = Session.make(experiment, FederatedData.make(experiment))
        return logits(session.adapted.model, session.tokenizer)


@pytest.mark.parametrize("name", fast(COMMON, "fedit", "flora", "ravan"))
def test_the_adapter_of_a_run_computes_in_peft_what_its_view_computes(name, finished):
    folder = finished(method={"name": name, "rank": 4})
    own = own_logits(folder)[""]
    assert_close(in_peft(folder, folder / "adapter"), own, rtol=1e-5, atol=1e-5)
    assert (own - untrained(folder)).abs().max() > 1e-4


@pytest.mark.parametrize("name", fast(COMMON, "flora"))
def test_the_merged_model_computes_in_transformers_what_the_view_computes(name, finished, tmp_path):
    folder = finished(method={"name": name, "rank": 4})
    assert export(folder, "merged", tmp_path / "merged") == {"": tmp_path / "merged"}
    assert_close(in_transformers(tmp_path / "merged"), own_logits(folder)[""], rtol=1e-5, atol=1e-5)


def test_the_merged_model_brings_its_tokenizer_and_the_names_of_the_labels(finished, tmp_path):
    export(finished(), "merged", tmp_path / "merged")
    pipeline = transformers.pipeline("text-classification", model=str(tmp_path / "merged"), device="cpu")
    found = pipeline(TEXTS[0], top_k=None)
    assert {answer["label"] for answer in found} == set(LABELS)
    own = own_logits(finished())[""][0].softmax(-1)
    assert_close(
        {a["label"]: a["score"] for a in found}, dict(zip(LABELS, own.tolist(), strict=True)), rtol=1e-4, atol=1e-5
    )


def personal(name: str) -> dict[str, Any]:
    """Settings with which the two clients differ."""
    return {"name": name, "rank": 4, **({"tasks": 2} if "tasks" in TABLE[name].settings() else {})}


@pytest.mark.parametrize("name", fast(PERSONAL, "fedsa-lora", "ce-lora"))
def test_a_personal_method_leaves_each_client_an_adapter_that_computes_its_own_view(name, finished):
    folder = finished(method=personal(name))
    own = own_logits(folder)
    assert sorted(own) == ["000", "001"]
    assert (own["000"] - own["001"]).abs().max() > 1e-3
    for client, expected in own.items():
        assert_close(in_peft(folder, folder / "adapter" / client), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", fast(PERSONAL, "fedsa-lora", "ce-lora"))
@pytest.mark.parametrize("client", ["000", "001"])
def test_one_client_of_a_personal_method_can_be_merged(name, client, finished, tmp_path):
    folder = finished(method=personal(name))
    export(folder, "merged", tmp_path / "merged", client)
    assert_close(in_transformers(tmp_path / "merged"), own_logits(folder)[client], rtol=1e-5, atol=1e-5)


def test_an_export_is_the_adapter_that_the_run_left(finished, tmp_path):
    export(finished(), "adapter", tmp_path / "again")
    first, again = (load_file(path / "adapter_model.safetensors") for path in (finished() / "adapter", tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize("rslora", fast([False, True], True))
def test_fixed_ranks_of_single_modules_and_rslora_are_exported(rslora, finished, tmp_path):
    lora = {"rslora": rslora, "alpha": 7.0, "rank_pattern": {r"layer\.0\..*\.query": 3, "layer.1.attention.self.value": 6}}
    folder = finished(lora=lora, method={"name": "fedit", "rank": 4})
    own = own_logits(folder)[""]
    ranks = {x.shape[0] for key, x in load_file(folder / "adapter/adapter_model.safetensors").items() if "lora_A" in key}
    assert ranks == {3, 4, 6}
    assert_close(in_peft(folder, folder / "adapter"), own, rtol=1e-5, atol=1e-5)
    export(folder, "merged", tmp_path / "merged")
    assert_close(in_transformers(tmp_path / "merged"), own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", fast(["gpt2", "distilbert", "roberta", "bert-without-pooler"], "gpt2"))
def test_other_architectures_compute_the_same_in_peft(base, finished):
    folder = finished(base, **LORA.get(base, {}))
    assert_close(in_peft(folder, folder / "adapter"), own_logits(folder)[""], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", fast(["fed-sb", "ravan"], "fed-sb"))
def test_a_middle_factor_on_transposed_weights_computes_the_same_in_peft_and_merged(name, finished, tmp_path):
    folder = finished("gpt2", method={"name": name, "rank": 4})
    own = own_logits(folder)[""]
    assert_close(in_peft(folder, folder / "adapter"), own, rtol=1e-5, atol=1e-5)
    export(folder, "merged", tmp_path / "merged")
    assert_close(in_transformers(tmp_path / "merged"), own, rtol=1e-5, atol=1e-5)
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(x.abs().max() > 1e-6 for key, x in tensors.items() if "lora_B" in key)


@pytest.mark.parametrize("base", fast(["gpt2", "distilbert", "roberta", "bert-without-pooler"], "gpt2"))
def test_other_architectures_compute_the_same_merged(base, finished, tmp_path):
    folder = finished(base, **LORA.get(base, {}))
    export(folder, "merged", tmp_path / "merged")
    assert_close(in_transformers(tmp_path / "merged"), own_logits(folder)[""], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", fast(["bert", "gpt2", "roberta"], "gpt2"))
def test_the_code_in_the_adapters_readme_gets_the_labels_the_tokenizer_and_the_same_logits(base, finished, monkeypatch):
    folder = finished(base)
    assert_close(by_its_card(folder / "adapter", monkeypatch), own_logits(folder)[""], rtol=1e-5, atol=1e-5)


def test_a_base_with_a_head_for_as_many_labels_needs_no_more_than_the_folder(finished):
    folder = finished("bert-with-head")
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(folder / "adapter")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "adapter")
    assert_close(logits(model, tokenizer), own_logits(folder)[""], rtol=1e-5, atol=1e-5)


def test_the_model_card_says_what_was_run_what_came_out_and_that_nothing_was_made_private(finished):
    folder = finished()
    card, last = (folder / "adapter" / "README.md").read_text(), _rows(folder)[-1]
    for part in (
        "`fedit`",
        "Rounds: 2",
        "`rows.jsonl`, 3 labels",
        "No differential privacy was used",
        "library_name: peft",
    ):
        assert part in card
    assert f"accuracy {last['global']['accuracy']:.4f}" in card and str(folder.parent) not in card


def test_a_checkpoint_in_bf16_is_merged_in_bf16(finished, tmp_path):
    folder = finished("bert-in-bf16")
    export(folder, "merged", tmp_path / "merged")
    assert {x.dtype for x in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    merged, own = in_transformers(tmp_path / "merged").float(), own_logits(folder)[""]
    assert_close(merged, own, rtol=0.05, atol=0.05)


def test_nothing_of_a_checkpoints_other_task_is_left_in_a_merged_model(finished, tmp_path):
    export(finished("bert-with-head"), "merged", tmp_path / "merged")
    assert not json.loads((tmp_path / "merged" / "config.json").read_text()).get("problem_type")


def test_a_mixture_of_experts_ends_its_run_without_an_adapter_and_says_why(tmp_path):
    rows, model = tiny_rows(tmp_path / "rows.jsonl", 45), tiny_bert(tmp_path / "bert")
    given = {"model": str(model), "data": str(rows), "rounds": 2, "train": {"lr": 0.02}}
    clients = {"count": 3, "partition": "iid"}
    result = run(Experiment.model_validate({**given, "clients": clients, "method": {"name": "fedlease"}}), tmp_path / "run")
    assert result.rows[-1].notes["experts"] == 2 and "3 of 3 not written: input-dependent mixtures" in result.left_out
    assert not result.adapters and not (result.folder / "adapter").exists()
    views = own_logits(result.folder)
    assert (views["000"] - views["001"]).abs().max() > 1e-3
    for to, client in (("adapter", None), ("adapter", "001"), ("merged", "001")):
        with pytest.raises(UserError, match="cannot be exported: input-dependent mixtures of experts"):
            export(result.folder, to, tmp_path / "out", client)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("base", fast(["bert", "gpt2", "roberta"], "bert"))
def test_a_model_that_was_trained_whole_is_merged_and_cannot_be_an_adapter(base, finished, tmp_path):
    folder = finished(base, method={"name": "full-ft", "scope": "all"})
    with pytest.raises(UserError, match=r"all parameters of the model were trained, .*; export a merged model"):
        export(folder, "adapter", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists() and not (folder / "adapter").exists()
    own = own_logits(folder)[""]
    export(folder, "merged", tmp_path / "merged")
    assert_close(in_transformers(tmp_path / "merged"), own, rtol=1e-5, atol=1e-5)
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    begin = transformers.AutoModelForSequenceClassification.from_pretrained(read_folder(folder).model, num_labels=3)
    pairs = zip(merged.base_model.named_parameters(), begin.base_model.parameters(), strict=True)
    assert [name for (name, after), before in pairs if torch.equal(after, before)] == []


@pytest.mark.slow
def test_a_run_that_trains_the_whole_model_says_why_it_has_no_adapter_and_resumes_bit_for_bit(tmp_path):
    given = {
        "model": str(tiny_bert(tmp_path / "bert")),
        "data": str(tiny_rows(tmp_path / "rows.jsonl", 45)),
        "clients": {"count": 3, "partition": "iid"},
        "method": {"name": "full-ft", "scope": "all"},
    }
    whole = run(Experiment.model_validate({**given, "rounds": 2}), tmp_path / "whole")
    assert whole.left_out.startswith("1 of 1 not written: all parameters of the model were trained") and not whole.adapters
    run(Experiment.model_validate({**given, "rounds": 1}), tmp_path / "halves")
    resume(tmp_path / "halves", overrides=["rounds=2"])
    assert_same_runs(tmp_path / "halves", tmp_path / "whole")


def test_a_folder_in_use_is_refused_and_stays_as_it_was(finished, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty; choose another"):
        export(finished(), "adapter", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_what_a_killed_export_left_does_not_block_the_next_one(finished, tmp_path):
    folder, out, killed = finished(), tmp_path / "a" / "out", export_module.save_file
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a killed process removes nothing
        patch.setattr(export_module, "save_file", failing(killed, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            export(folder, "adapter", out)
    assert not out.exists() and len([*(tmp_path / "a").iterdir()]) == 1
    export(folder, "adapter", out)
    assert (out / "adapter_config.json").exists() and [*(tmp_path / "a").iterdir()] == [out]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_an_export_that_fails_leaves_nothing_and_is_one_line(finished, tmp_path, monkeypatch, error):
    folder = finished()
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(export_module, "save_file", failing(export_module.save_file, error))
    with pytest.raises(UserError, match=r"out: cannot be written: No space left on device$"):
        export(folder, "adapter", tmp_path / "out")
    assert [*tmp_path.iterdir()] == [tmp_path / "out"] and not any((tmp_path / "out").iterdir())


def failing(save: Callable[..., None], error: BaseException) -> Callable[..., None]:
    """The function, which writes its file and then fails."""

    def fails(*given: Any, **named: Any) -> None:
        save(*given, **named)
        raise error

    return fails


def test_a_run_without_a_complete_round_has_nothing_to_export(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "experiment.toml").write_text(Experiment().to_toml())
    with pytest.raises(UserError, match="no complete round yet"):
        export(tmp_path / "run", "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_run_has_nothing_to_export(tmp_path):
    with pytest.raises(UserError, match="not a run directory"):
        export(tmp_path, "adapter", tmp_path / "out")


@pytest.mark.parametrize("name", fast(["fedit", *PERSONAL], "fedit", "fedsa-lora"))
def test_an_unknown_client_is_refused_and_nothing_is_written(name, finished, tmp_path):
    with pytest.raises(UserError, match="'nobody': no client with this name has an adapter; available: "):
        export(finished(method={"name": name, "rank": 4}), "adapter", tmp_path / "out", client="nobody")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", fast(PERSONAL, "fedsa-lora", "ce-lora"))
def test_a_personal_method_cannot_be_merged_without_a_client(name, finished, tmp_path):
    with pytest.raises(UserError, match="--client"):
        export(finished(method={"name": name, "rank": 4}), "merged", tmp_path / "out")
    assert not (tmp_path / "out").exists()
