"""Time and memory of a simulated round on a GPU, compared with a hand-written PyTorch + PEFT loop, in under 8 minutes.

    python benchmarks/gpu.py TRAIN.jsonl.gz TEST.jsonl.gz PROMPTS.jsonl.gz TEST_PROMPTS.jsonl.gz [--minutes 8]

W1 as in `simulator.py`, on the first two files; W3 with 16 clients of 32 rows, on the last two, both in fp32 and bf16. The
same as W3 with 8 clients of 16 rows for a Llama of a billion random parameters, in bf16, and with its base in nf4, compared
with the loop in bf16. Every measurement runs in a process of its own. One that is not possible, or for which no time is
left, is marked absent.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from simulation.sides import by_hand, product
from simulation.works import ANSWERS, WORKS, Work

LLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
"""The sizes of Llama 3.2 1B, with the vocabulary of SmolLM2."""
PROMPTS = replace(WORKS["W3"], clients=16, rows=512, chosen=16, large=32, eval_batch=16)
PLANS = {"W1": WORKS["W1"], "W3": PROMPTS, "Llama 1B": replace(PROMPTS, clients=8, rows=128, chosen=8)}
LINES = (("W1", "fp32"), ("W1", "bf16"), ("W3", "fp32"), ("W3", "bf16"), ("Llama 1B", "bf16"), ("Llama 1B", "nf4"))
SIDES = (
    "hand-written baseline",
    "fedlora, one client at a time",
    "fedlora, 16 clients in a step",
    "non-federated baseline",
)
TINY = {"clients": 2, "rows": 4, "chosen": 2, "rounds": 1, "batch": 2, "longest": 32, "test_rows": 2}
TINY_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def reason(side: str, precision: str, device: str, seconds_left: float) -> str | None:
    """Why nothing can be measured; None if it can."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return "no GPU"
    if precision == "nf4" and find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    if precision == "nf4" and not side.startswith("fedlora"):
        return "written for bf16"
    return None if seconds_left > 0 else "no time left"


def write_llama(folder: Path, **sizes: int) -> None:
    """Writes a Llama with random weights and SmolLM2's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from fedlora.models.gguf import gguf_arguments
    from fedlora.models.loading import locate

    path, file = gguf_arguments(locate(ANSWERS["model"]))
    tokenizer = AutoTokenizer.from_pretrained(path, **file)
    torch.manual_seed(0)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    LlamaForCausalLM(LlamaConfig(**{**LLAMA, **sizes, **ids})).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(name: str, work: Work, files: Sequence[str], precision: str, device: str) -> dict[str, float]:
    """One side: seconds of a round (median), accuracy, peak memory of the GPU in MB."""
    import torch

    if precision == "nf4":
        work, precision = replace(work, settings={**work.settings, "quantize": "nf4"}), "bf16"
    if name.startswith("fedlora"):
        found = product(files, work, 0, 16 if "16" in name else 1, precision, device)
    else:
        dtype = {"fp32": "float32", "bf16": "bfloat16"}[precision]
        found = by_hand(files, work, 0, large=name.startswith("non"), precision=dtype, device=device)
    return {**found, "peak_mb": torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else 0.0}


def apart(arguments: Sequence[str], seconds: float) -> dict[str, float] | None:
    """The result of this script with these arguments in a process of its own; None if it takes longer."""
    try:
        run = subprocess.run([sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs=4)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # on the CPU, to try this script out
    parser.add_argument("--one", nargs=4, metavar=("WORK", "SIDE", "PRECISION", "LLAMA"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    device, changed = ("cpu", TINY) if given.tiny else ("cuda", {})
    if given.one:
        kind, name, precision, llama = given.one
        work = replace(PLANS[kind], **changed)
        if kind == "Llama 1B":
            work = replace(work, settings={**work.settings, "model": llama})
        files = given.files[:2] if kind == "W1" else given.files[2:]
        print(json.dumps(measure(name, work, files, precision, device)))
        return
    end, baseline = time.perf_counter() + 60 * given.minutes, 0.0
    print("| work | side | seconds per round | samples/s | speed relative to baseline | peak memory | test accuracy |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for kind, precision in LINES:
            title, baseline = f"{kind}, {precision}", baseline if precision == "nf4" else 0.0
            for name in SIDES:
                left = end - time.perf_counter()
                absent = reason(name, precision, device, left)
                if absent is None and kind == "Llama 1B" and not list(Path(folder).iterdir()):
                    write_llama(Path(folder), **(TINY_LLAMA if given.tiny else {}))
                tiny = ["--tiny"] if given.tiny else []
                one = None if absent else apart([*given.files, *tiny, "--one", kind, name, precision, folder], left)
                if one is None:
                    print(f"| {title} | {name} | absent: {absent or 'no time left'} | | | | |", flush=True)
                    continue
                baseline = baseline or one["seconds"]
                samples = replace(PLANS[kind], **changed).samples / one["seconds"]
                cells = [f"{one['seconds']:.2f}", f"{samples:.0f}", f"{baseline / one['seconds']:.2f}"]
                cells += [f"{one['peak_mb']:.0f} MB", f"{one['accuracy']:.3f}"]
                print(f"| {title} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
