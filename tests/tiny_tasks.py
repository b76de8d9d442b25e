"""A tiny model and examples for each kind of task. Needs no network."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_images import tiny_npz, tiny_vit
from tiny_lm import CHATML, pair_rows, tiny_lm
from tiny_seq2seq import tiny_seq2seq

from tiny import LABELS, WORDS, tiny_bert, tiny_rows

Row = dict[str, Any]


def classification(home: Path) -> Row:
    """Texts with labels."""
    return _texts(home, lambda row: row)


def regression(home: Path) -> Row:
    """Scores in place of the labels."""
    return _texts(home, lambda row: {**row, "label": LABELS.index(row["label"]) + 0.5})


def tagging(home: Path) -> Row:
    """The words of a text, with the label as an entity of two words."""

    def tagged(row: Row) -> Row:
        words, entity = row["text"].split(), row["label"]
        return {"tokens": words, "tags": [f"B-{entity}", f"I-{entity}", *["O"] * (len(words) - 2)]}

    return _texts(home, tagged)


def multiple_choice(home: Path) -> Row:
    """The text as a question, with a word for each label as options."""
    names = {name: name for name in ("prompt", "options", "answer")}
    words = dict(zip(LABELS, WORDS[::30], strict=True))  # known to the tokenizer, as names of labels are not
    found = _texts(
        home, lambda row: {"prompt": row["text"], "options": [*words.values()], "answer": words[row["label"]]}, **names
    )
    return found | {"model": str(tiny_lm(home / "gpt2", "gpt2"))}


def image_classification(home: Path) -> Row:
    """Images, which are mirrored at random."""
    task = {"kind": "image-classification", "augment": "flip"}
    return {"task": task, "model": str(tiny_vit(home / "vit")), "data": {"source": str(tiny_npz(home / "rows.npz", 48))}}


def causal_lm(home: Path) -> Row:
    """Conversations, with generated answers."""
    data = {"source": str(pair_rows(home / "chats.jsonl", 40)), "messages": "messages"}
    model = tiny_lm(home / "llama", template=CHATML)
    return {"model": str(model), "data": data, "evaluate": {"generate": 2, "max_new_tokens": 4}}


def seq2seq(home: Path) -> Row:
    """Prompts with answers, and generated answers."""
    data = {"source": str(pair_rows(home / "pairs.jsonl", 40)), "prompt": "prompt", "response": "response"}
    model = tiny_seq2seq(home / "t5", "t5")
    return {"model": str(model), "data": data, "evaluate": {"generate": 4, "max_new_tokens": 4}}


def _texts(home: Path, form: Callable[[Row], Row], **columns: str) -> Row:
    """A BERT without dropout, and the texts with labels in this form."""
    rows = map(json.loads, tiny_rows(home / "texts.jsonl", 48).read_text().splitlines())
    (home / "rows.jsonl").write_text("\n".join(json.dumps(form(row)) for row in rows))
    model = tiny_bert(home / "bert", dropout=0.0)
    return {"model": str(model), "data": {"source": str(home / "rows.jsonl"), **columns}}


_TASKS = {
    "classification": classification,
    "regression": regression,
    "image-classification": image_classification,
    "tagging": tagging,
    "multiple-choice": multiple_choice,
    "causal-lm": causal_lm,
    "seq2seq": seq2seq,
}


def tiny_task(kind: str, home: Path) -> dict[str, Any]:
    """Writes a model, without dropout, and examples for this kind of task to a new folder; the settings that name them."""
    home.mkdir()
    return {"task": kind, **_TASKS[kind](home)}
