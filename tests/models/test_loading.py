"""Models as they are loaded: what is drawn fresh, and what is refused without a question or a traceback."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from fedlora.errors import UserError
from fedlora.models.fingerprint import fingerprint
from fedlora.models.quantized import quantizable
from fedlora.tasks.classification import Classification

from tiny import LABELS, tiny_bert, tiny_model, tiny_tokenizer

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
WIDE = {"d_model": 16, "vocab_size": 128, "pad_token_id": 3, "eos_token_id": 2, "d_ff": 24, "d_kv": 8, "num_heads": 2}
OTHER_LABELS = {
    "bert": transformers.BertConfig(
        vocab_size=128, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=5
    ),
    "t5": transformers.T5Config(num_layers=1, decoder_start_token_id=3, num_labels=2, **WIDE),
}
LOADS = [lambda path: Classification().load(str(path), LABELS, 0), lambda path: Classification().outline(str(path), LABELS)]


def change(file: Path, **entries: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


@pytest.mark.parametrize("kind", OTHER_LABELS)
def test_a_head_for_another_number_of_labels_is_replaced_by_one_from_the_seed_and_the_user_is_told(kind, tmp_path):
    tiny_model(tmp_path, OTHER_LABELS[kind], tiny_tokenizer(*SPECIAL, append="</s>", **NAMES), head=True)
    stored = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).state_dict()
    (one, _, checkpoint), (same, _, _), (other, _, _) = (Classification().load(str(tmp_path), LABELS, s) for s in (1, 1, 2))
    assert one.config.num_labels == 3 and list(one.config.id2label.values()) == list(LABELS)
    for name, x in one.state_dict().items():
        if name in checkpoint.new:
            assert len(x) == len(LABELS) != len(stored[name])
        else:
            assert torch.equal(x, stored[name])
        assert torch.equal(x, same.state_dict()[name])
    assert any(not torch.equal(one.state_dict()[name], other.state_dict()[name]) for name in checkpoint.new)
    (note,) = checkpoint.notes
    assert "a head of another size" in note and "\n" not in note


def test_a_head_for_as_many_labels_is_kept_and_nothing_is_said_of_it(tmp_path):
    config = transformers.BertConfig(**{**OTHER_LABELS["bert"].to_dict(), "num_labels": 3, "problem_type": "regression"})
    tiny_model(tmp_path, config, tiny_tokenizer(*SPECIAL, **NAMES), head=True)
    model, _, checkpoint = Classification().load(str(tmp_path), LABELS, 0)
    stored = load_file(tmp_path / "model.safetensors")
    assert_close(model.state_dict()["classifier.weight"], stored["classifier.weight"], rtol=0, atol=0)
    assert checkpoint.new == checkpoint.notes == () and model.config.problem_type is None


@pytest.mark.parametrize("pooler", [True, False])
def test_a_checkpoint_may_lack_a_pooler_but_no_other_part_of_its_base_model(pooler, tmp_path):
    tiny_bert(tmp_path)
    file = tmp_path / "model.safetensors"
    lost = "pooler" if pooler else "encoder.layer.1.output"
    save_file({n: x for n, x in load_file(file).items() if lost not in n}, file, metadata={"format": "pt"})
    if pooler:
        _, _, checkpoint = Classification().load(str(tmp_path), LABELS, 0)
        assert {"bert.pooler.dense.weight", "classifier.weight"} <= set(checkpoint.new)
        return
    with pytest.raises(
        UserError, match=r"weights do not match config.json: 4 parameters .* such as bert.encoder.layer.1.output"
    ):
        Classification().load(str(tmp_path), LABELS, 0)


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-2000])


def lost_shard(folder: Path) -> None:
    transformers.AutoModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="30KB")
    (folder / "model.safetensors").unlink()
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def own_code(folder: Path) -> None:
    change(folder / "config.json", model_type="house_made", auto_map={"AutoConfig": "conf.C"})


def no_head(folder: Path) -> None:
    transformers.CLIPConfig().save_pretrained(folder)


def no_package(folder: Path) -> None:
    change(folder / "config.json", quantization_config={"quant_method": "aqlm"})


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_weights, "is damaged: it has no safetensors header"),
        (pointer, "is a git-lfs pointer, not the weights; download them with git lfs pull"),
        (cut, "is damaged: it has [0-9]+ bytes instead of [0-9]+; download it again"),
        (lost_shard, "is missing; download it again"),
        (own_code, "requires remote code, which is not supported"),
        (no_head, "no AutoModelForSequenceClassification for 'clip'"),
        (no_package, "cannot be loaded: .*aqlm"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line_and_nobody_is_asked(load, damage, message, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked on the terminal"))
    damage(tiny_bert(tmp_path))
    with pytest.raises(UserError, match=message) as rejected:
        load(tmp_path)
    assert "\n" not in str(rejected.value)


def test_code_that_a_folder_brings_beside_a_known_model_is_not_run(tmp_path):
    tiny_bert(tmp_path)
    change(tmp_path / "config.json", auto_map={"AutoModelForSequenceClassification": "mod.M", "AutoConfig": "mod.C"})
    change(tmp_path / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["mod.T", None]})
    (tmp_path / "mod.py").write_text("raise SystemExit('it was run')\n")
    assert type(Classification().load(str(tmp_path), LABELS, 0)[0]) is transformers.BertForSequenceClassification


def test_an_outline_has_the_model_s_modules_and_none_of_its_weights(tmp_path):
    tiny_bert(tmp_path)
    outline, _ = Classification().outline(str(tmp_path), LABELS)
    model, _, _ = Classification().load(str(tmp_path), LABELS, 0)
    assert {n: x.shape for n, x in outline.named_parameters()} == {n: x.shape for n, x in model.named_parameters()}
    assert all(x.is_meta for x in outline.parameters())


def test_a_quantized_base_without_its_package_is_refused_with_the_command_that_installs_it(tmp_path, monkeypatch):
    model, _, _ = Classification().load(str(tiny_bert(tmp_path)), LABELS, 0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"'bitsandbytes' is not installed; pip install 'fedlora\[quantize\]' installs it$"):
        quantizable(model, "nf4", ["classifier"])


def test_a_checkpoint_of_several_files_in_bf16_is_loaded_as_the_same_weights_in_fp32(tmp_path):
    bert = transformers.AutoModel.from_pretrained(tiny_bert(tmp_path)).bfloat16()
    (tmp_path / "model.safetensors").unlink()
    bert.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    model, _, checkpoint = Classification().load(str(tmp_path), LABELS, 0)
    assert checkpoint.dtype == torch.bfloat16 and set(checkpoint.new) == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(model.bert.get_parameter(name), x.float()) for name, x in bert.named_parameters())
    assert sorted(fingerprint(str(tmp_path)).keys() & {one.name for one in tmp_path.glob("model-*")}) == sorted(
        one.name for one in tmp_path.glob("model-*")
    )
