"""Tokenizers: what they pad with, which token is read, and what is refused, against plain transformers."""

import json

import pytest
import torch
import transformers
from torch.testing import assert_close

from fedlora.errors import UserError
from fedlora.models.tokenizers import check_known, check_lengths, positions
from fedlora.tasks.classification import Classification
from fedlora.tasks.task import Examples

from tiny import LABELS, WORDS, tiny_bert, tiny_model, tiny_tokenizer

TASK = Classification()
TEXTS = [WORDS[0], " ".join(WORDS[:7]), f"{WORDS[3]} qqq", "qqq"]
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 128}
LLAMA = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=None)
SIDES = {"d_model": 16, "vocab_size": 128, "pad_token_id": 3, "eos_token_id": 2, "num_labels": 3}
BART = transformers.BartConfig(
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
    max_position_embeddings=64,
    bos_token_id=1,
    **SIDES,
)
T5 = transformers.T5Config(num_layers=1, num_heads=2, d_ff=24, d_kv=8, decoder_start_token_id=3, **SIDES)
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")


def encoded(tokenizer, texts: list[str], max_length: int = 32) -> Examples:
    return TASK.encode(tokenizer, {"text": texts, "label": [0] * len(texts)}, max_length)


def logits(model, tokenizer, texts: list[str]) -> torch.Tensor:
    """As training and evaluation compute them: in one padded batch."""
    with torch.no_grad():
        return model.eval()(**encoded(tokenizer, texts).batch(torch.arange(len(texts)), torch.device("cpu"))[0]).logits


def plain(folder, head, tokenizer, texts: list[str], padded: bool, **kwargs) -> torch.Tensor:
    """As transformers alone computes them with the folder's own config and this head, each text alone or in a batch."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(LABELS), **kwargs)
    model.load_state_dict(head, strict=False)
    batches = [texts] if padded else [[text] for text in texts]
    with torch.no_grad():
        return torch.cat([model.eval()(**tokenizer(b, padding=padded, return_tensors="pt")).logits for b in batches])


def head_of(model) -> dict[str, torch.Tensor]:
    return {name: x for name, x in model.state_dict().items() if not name.startswith(model.base_model_prefix)}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("append", ["", "</s>"])
@pytest.mark.parametrize(
    "names",
    [
        {},
        {"eos_token": "</s>", "bos_token": "<s>"},
        {"eos_token": "</s>", "bos_token": "<s>", "pad_token": "</s>"},
        {"eos_token": "</s>", "bos_token": "<s>", "pad_token": "<unk>"},
        {"eos_token": "</s>", "pad_token": "<pad>"},
    ],
)
def test_a_decoders_head_reads_the_same_token_in_training_in_a_plain_base_and_in_an_exported_model(
    names, append, side, tmp_path
):
    special = {"eos_token": append} if append else {"bos_token": "<s>"}
    folder = tiny_model(tmp_path / "model", LLAMA, tiny_tokenizer(*SPECIAL, append=append, **{**special, **names}))
    untouched = transformers.AutoTokenizer.from_pretrained(folder)
    model, tokenizer, _ = Classification().load(str(folder), LABELS, 0)
    own, head = logits(model, tokenizer, TEXTS), head_of(model)
    assert_close(plain(folder, head, untouched, TEXTS, padded=False), own)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved", padding_side=side)
    assert_close(plain(tmp_path / "saved", head, exported, TEXTS, padded=side == "left"), own)
    assert_close(plain(folder, head, exported, TEXTS, padded=True, pad_token_id=exported.pad_token_id), own)


def test_a_decoder_whose_config_has_a_pad_token_keeps_it_though_each_text_ends_with_it(tmp_path):
    config = transformers.LlamaConfig(**{**LLAMA.to_dict(), "pad_token_id": 2})
    names = {"eos_token": "</s>", "bos_token": "<s>", "pad_token": "<pad>"}
    folder = tiny_model(tmp_path, config, tiny_tokenizer(*SPECIAL, append="</s>", **names))
    model, tokenizer, _ = Classification().load(str(folder), LABELS, 0)
    own, head = logits(model, tokenizer, TEXTS), head_of(model)
    assert_close(plain(folder, head, transformers.AutoTokenizer.from_pretrained(folder), TEXTS, padded=False), own)
    assert_close(plain(folder, head, tokenizer, TEXTS, padded=True), own)


@pytest.mark.parametrize("pad", ["<pad>", "</s>"])
def test_a_pad_token_beyond_the_embeddings_is_not_used(pad, tmp_path):
    tokenizer = tiny_tokenizer("<unk>", "<s>", "</s>", bos_token="<s>", eos_token="</s>")
    config = transformers.LlamaConfig(**{**LLAMA.to_dict(), "vocab_size": len(tokenizer)})
    tokenizer.add_special_tokens({"pad_token": pad})
    folder = tiny_model(tmp_path, config, tokenizer)
    model, tokenizer, _ = Classification().load(str(folder), LABELS, 0)
    assert tokenizer.pad_token_id == model.config.pad_token_id == tokenizer.eos_token_id < config.vocab_size
    assert logits(model, tokenizer, TEXTS).isfinite().all()


@pytest.mark.parametrize(
    "load", [lambda path: Classification().load(path, LABELS, 0), lambda path: Classification().outline(path, LABELS)]
)
@pytest.mark.parametrize(
    ("special", "added", "pad", "message"),
    [
        (("<unk>",), [], None, "no usable pad token"),
        (("<unk>", "<s>"), ["gazebo", "pergola"], None, "2 tokens beyond the model's 96 embeddings, such as 'gazebo'"),
        (("<unk>", "<s>"), [], 5, "pad_token_id = 5 in config.json is an ordinary token of the tokenizer, 'bak'"),
    ],
)
def test_a_tokenizer_that_does_not_fit_the_model_is_refused_in_one_line(load, special, added, pad, message, tmp_path):
    tokenizer = tiny_tokenizer(*special, **dict(zip(("unk_token", "bos_token"), special, strict=False)))
    tokenizer.add_tokens(added)
    size = len(tokenizer) - len(added)
    config = transformers.LlamaConfig(**{**LLAMA.to_dict(), "vocab_size": size, "pad_token_id": pad})
    tiny_model(tmp_path, config, tokenizer)
    with pytest.raises(UserError, match=message) as rejected:
        load(str(tmp_path))
    assert "\n" not in str(rejected.value)


@pytest.mark.parametrize("config", [transformers.BertConfig(**SMALL), LLAMA, T5, transformers.RobertaConfig(**SMALL)])
def test_a_folder_without_a_tokenizer_is_refused_in_one_line(config, tmp_path):
    tiny_model(tmp_path, config)
    with pytest.raises(UserError, match=r"tokenizer.*with tokenizer.save_pretrained") as rejected:
        Classification().load(str(tmp_path), LABELS, 0)
    assert "\n" not in str(rejected.value)


def test_texts_of_unknown_words_alone_are_refused(tmp_path):
    _, tokenizer, _ = Classification().load(str(tiny_bert(tmp_path)), LABELS, 0)
    check_known(encoded(tokenizer, ["qqq", f"qqq {WORDS[0]}"]).features, tokenizer)
    with pytest.raises(UserError, match=r"no text has a word of .* within train.max_length; raise it"):
        check_known(encoded(tokenizer, ["qqq", "qqq qq"]).features, tokenizer)


@pytest.mark.parametrize(("config", "pieces"), [(BART, False), (BART, True), (T5, False), (T5, True)])
def test_a_special_token_written_out_in_a_text_is_text(config, pieces, tmp_path):
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    folder = tiny_model(tmp_path / "model", config, tiny_tokenizer(*SPECIAL, append="</s>", pieces=pieces, **names))
    texts = [*TEXTS, f"{WORDS[0]}</s> {WORDS[1]}", "</s>", f"<pad> {WORDS[2]} <s>"]
    before = transformers.AutoTokenizer.from_pretrained(folder)
    model, tokenizer, _ = Classification().load(str(folder), LABELS, 0)
    examples = encoded(tokenizer, texts)
    rows = [
        examples.features["input_ids"][a:b].tolist() for a, b in zip(examples.starts, examples.starts[1:], strict=False)
    ]
    assert all(row[-1] == 2 and not {1, 2, 3} & set(row[:-1]) for row in rows)
    assert rows[: len(TEXTS)] == before(TEXTS)["input_ids"]
    assert len(rows[4]) > len(before(texts[4])["input_ids"])  # in several tokens
    assert logits(model, tokenizer, texts).shape == (7, 3)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")(texts)["input_ids"] == rows


POSITIONS = {
    "bert": transformers.BertConfig(**SMALL, max_position_embeddings=20),
    "roberta": transformers.RobertaConfig(**SMALL, max_position_embeddings=20, pad_token_id=3),
    "mpnet": transformers.MPNetConfig(**SMALL, max_position_embeddings=20, pad_token_id=3),
    "gpt2": transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=128, n_positions=20, pad_token_id=3),
    "opt": transformers.OPTConfig(
        hidden_size=16,
        word_embed_proj_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=24,
        vocab_size=128,
        max_position_embeddings=20,
        pad_token_id=3,
    ),
    "bart": transformers.BartConfig(**{**BART.to_dict(), "max_position_embeddings": 20}),
}


@pytest.mark.parametrize("kind", POSITIONS)
def test_the_longest_input_is_the_one_behind_which_the_model_fails(kind):
    model = transformers.AutoModelForSequenceClassification.from_config(POSITIONS[kind]).eval()
    longest = positions(model)

    def call(length: int) -> None:
        ids = torch.full((1, length), 7)
        ids[0, -1] = 2
        model(input_ids=ids, attention_mask=torch.ones_like(ids))

    call(longest)
    with pytest.raises((IndexError, RuntimeError)):
        call(longest + 1)


def test_a_model_of_relative_positions_has_no_longest_input():
    assert positions(transformers.AutoModelForSequenceClassification.from_config(T5)) is None


def test_examples_that_fit_are_not_asked_about_and_longer_ones_are_refused_with_the_largest_length():
    check_lengths(torch.tensor([3, 20]), max_length=128, limit=20)
    check_lengths(torch.tensor([3, 200]), max_length=256, limit=None)
    message = r"train.max_length = 128: 2 of 3 examples are longer than the model's 20 positions; .* at most 20"
    with pytest.raises(UserError, match=message):
        check_lengths(torch.tensor([21, 20, 30]), max_length=128, limit=20)
    with pytest.raises(UserError, match="1 of 2 examples are empty"):
        check_lengths(torch.tensor([3, 0]), max_length=128, limit=20)


@pytest.mark.parametrize("pad", [None, 2, 3])
def test_features_of_a_decoder_are_what_its_head_reads(pad, tmp_path):
    config = transformers.LlamaConfig(**{**LLAMA.to_dict(), "pad_token_id": pad})
    names = {"eos_token": "</s>", "bos_token": "<s>"}
    folder = tiny_model(tmp_path, config, tiny_tokenizer(*SPECIAL, append="</s>", **names, pad_token="<pad>"))
    model, tokenizer, _ = Classification().load(str(folder), LABELS, 0)
    inputs, _ = encoded(tokenizer, TEXTS).batch(torch.arange(4), torch.device("cpu"))
    with torch.no_grad():
        assert_close(model.score(TASK.features(model.eval(), inputs)), model(**inputs).logits)


@pytest.mark.parametrize("config", [BART, T5])
def test_features_of_an_encoder_decoder_are_what_its_head_reads(config, tmp_path):
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    folder = tiny_model(tmp_path, config, tiny_tokenizer(*SPECIAL, append="</s>", **names))
    model, tokenizer, _ = Classification().load(str(folder), LABELS, 0)
    inputs, _ = encoded(tokenizer, TEXTS).batch(torch.arange(4), torch.device("cpu"))
    with torch.no_grad():
        assert_close(model.classification_head(TASK.features(model.eval(), inputs)), model(**inputs).logits)


def test_the_kept_tokens_are_not_those_of_a_tokenizer_that_reads_special_tokens_in_texts(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    _, tokenizer, _ = Classification().load(str(tiny_bert(tmp_path / "bert")), LABELS, 0)
    first = encoded(tokenizer, ["[SEP]", WORDS[0]])
    assert json.dumps(first.starts.tolist()) == json.dumps(encoded(tokenizer, ["[SEP]", WORDS[0]]).starts.tolist())
    assert first.lengths()[0] > 3 and len(list((tmp_path / "cache").iterdir())) == 1


def test_a_tokenizer_is_saved_the_same_whatever_it_was_used_for(tmp_path):
    _, tokenizer = Classification().outline(str(tiny_bert(tmp_path / "bert")), LABELS)
    tokenizer.save_pretrained(tmp_path / "before")
    Classification().encode(tokenizer, {"text": ["baba bab ba"], "label": [0]}, 3)
    tokenizer.save_pretrained(tmp_path / "after")
    assert (tmp_path / "after" / "tokenizer.json").read_text() == (tmp_path / "before" / "tokenizer.json").read_text()
