"""A small T5 with random weights learns a toy by federation, as no pretrained T5 is in a package: three seeds, as a sweep.

    python benchmarks/t5_toy.py OUT

The prompt is a few words of one of three groups, the answer the group's name, of two words. Eight clients train LoRA of
rank 8 on all linear modules except the output layer. Accuracy: the fraction of test answers that greedy decoding writes
exactly, before the first round and after the last one.
"""

import argparse
import json
import random
from pathlib import Path

import tokenizers
import transformers
from tokenizers import models, pre_tokenizers, processors

from fedlora import Result, sweep

GROUPS = [[f"{letter}{i}" for i in range(8)] for letter in "abc"]
NAMES = ("first one", "second one", "third group")
SPECIAL = ("<pad>", "</s>", "<unk>")


def write_model(folder: Path) -> None:
    """A T5 from its configuration, and a tokenizer of words."""
    words = [
        *SPECIAL,
        *sorted({word for name in NAMES for word in name.split()}),
        *(word for group in GROUPS for word in group),
    ]
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = transformers.T5Config(
        vocab_size=len(words), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, initializer_factor=1.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    transformers.set_seed(0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)


def write_rows(file: Path, count: int, seed: int) -> None:
    """Prompts and answers."""
    rng = random.Random(seed)
    rows = [
        {"prompt": " ".join(rng.choices(GROUPS[i % 3], k=rng.randint(2, 5))), "response": NAMES[i % 3]}
        for i in range(count)
    ]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def main() -> None:
    """Runs the sweep and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a new directory")
    out = parser.parse_args().out
    out.mkdir(parents=True)
    write_model(out / "model")
    write_rows(out / "train.jsonl", 480, 0)
    write_rows(out / "test.jsonl", 150, 1)
    base = {
        "model": str(out / "model"),
        "task": {"kind": "seq2seq"},
        "data": {
            "source": str(out / "train.jsonl"), "test": str(out / "test.jsonl"),
            "prompt": "prompt", "response": "response",
        },
        "rounds": 12,
        "clients": {"count": 8, "alpha": 0.5, "held_out": 0.0},
        "method": {"name": "fedit", "rank": 8},
        "lora": {"targets": "all-linear", "alpha": 16.0},
        "train": {"lr": 1e-2, "batch_size": 8, "max_length": 16, "device": "cpu"},
        "evaluate": {"every": 12, "clients": "none"},
    }  # fmt: skip
    found = sweep({"base": base, "seeds": [0, 1, 2]}, out=out / "sweep")
    print("| seed | loss before | after | accuracy before | after |\n|---|---|---|---|---|")
    for seed, run in found.cases[0].runs.items():
        first, last = (row.global_ for row in (Result.read(run).rows[0], Result.read(run).rows[-1]))
        print(f"| {seed} | {first['loss']:.3f} | {last['loss']:.3f} | {first['accuracy']:.3f} | {last['accuracy']:.3f} |")


if __name__ == "__main__":
    main()
