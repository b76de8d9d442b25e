"""A BERT so small that training it costs nothing, and examples for it. Needs no network."""

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import Unigram, WordLevel
from tokenizers.pre_tokenizers import Metaspace, Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, BertTokenizerFast

WORDS = [first + last for first in ("ba", "ce", "di", "fo", "gu", "ha", "li", "mo", "nu") for last in "bdfklmnprs"]
LABELS = ("east", "north", "west")


def tiny_bert(folder: Path, seed: int = 0, hidden: int = 32, dropout: float = 0.1) -> Path:
    """Writes a BERT with random weights and without a task head, and its tokenizer of some 100 words; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, ".", ","]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64)
    tokenizer.save_pretrained(folder)
    shape = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BertModel(shape).save_pretrained(folder)
    return folder


def tiny_rows(path: Path, n: int) -> Path:
    """Writes `n` examples as JSON Lines: 3 to 12 words, of which the first ones tell the label; the file."""
    rng = torch.Generator().manual_seed(n)
    with path.open("w", encoding="utf-8") as file:
        for i in range(n):
            label = i % len(LABELS)
            draw = torch.randint(30, (3 + i * 7 % 10,), generator=rng).tolist()
            words = [WORDS[30 * label + k] if j < 3 else WORDS[3 * k] for j, k in enumerate(draw)]
            file.write(json.dumps({"text": " ".join(words), "label": LABELS[label], "user": f"u{i % 4}"}) + "\n")
    return path


def tiny_tokenizer(
    *special: str, append: str = "", pieces: bool = False, **names: str
) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of WORDS and these special tokens, the first of them `unk`; `append` is put after each text.

    With `pieces` it is one of T5's kind, whose model has the special tokens among its pieces. `names` are pad_token etc.
    """
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS, *"</s>"])}
    if pieces:
        scored = [(token, 0.0) for token in special] + [(f"\u2581{word}", -2.0) for word in WORDS]
        words = Tokenizer(Unigram([*scored, ("\u2581", -3.0), *((c, -4.0) for c in "</s>")], unk_id=0))
        words.pre_tokenizer = Metaspace()
    else:
        words = Tokenizer(WordLevel(vocabulary, unk_token=special[0]))
        words.pre_tokenizer = Whitespace()
    if append:
        ends = [(append, special.index(append))]
        words.post_processor = TemplateProcessing(f"$A {append}", f"$A {append} $B {append}", ends)
    names = {"unk_token": special[0], **names}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, model_input_names=["input_ids", "attention_mask"], **names
    )


def tiny_model(
    folder: Path, config: transformers.PretrainedConfig, tokenizer: object = None, head: bool = False, auto: object = None
) -> Path:
    """Writes a model of this configuration with random weights and a tokenizer; the folder."""
    kind = auto or (transformers.AutoModelForSequenceClassification if head else transformers.AutoModel)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind.from_config(config).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder
