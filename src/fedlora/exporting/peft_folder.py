"""Reads a PEFT folder as an adapter of this package."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedlora.adapter import Scaling
from fedlora.errors import UserError
from fedlora.linalg.lowrank import LowRank
from fedlora.parts.dense import Dense
from fedlora.parts.dora import Dora
from fedlora.parts.table import Factors

CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_(?:(A|B)\.weight|embedding_(A|B)|magnitude_vector)")


@dataclass(frozen=True)
class PeftFolder:
    """The adapter in a PEFT folder, with its head if it has one, and PEFT's settings."""

    adapter: Mapping[str, Factors]
    config: Mapping[str, Any]

    @property
    def base(self) -> str:
        """The source of the base model. A folder with a GGUF file only, which PEFT cannot name, stands for that file."""
        base = str(self.config.get("base_model_name_or_path") or "")
        folder = Path(base)
        files = [] if (folder / "config.json").exists() else sorted(folder.glob("*.gguf")) if folder.is_dir() else []
        return str(files[0]) if len(files) == 1 else base

    @property
    def lora(self) -> dict[str, Any]:
        """The settings of the section `lora`."""
        targets = sorted(name for name, part in self.adapter.items() if not part.in_head)
        return {
            "targets": targets,
            "alpha": float(self.config["lora_alpha"]),
            "rslora": bool(self.config.get("use_rslora")),
            "dora": bool(self.config.get("use_dora")),
        }

    @classmethod
    def read(cls, folder: Path) -> "PeftFolder":
        """Reads the folder; the scale of PEFT's factors becomes part of b.

        Raises:
            UserError: a file is missing or damaged, or the adapter is not a LoRA or DoRA of linear modules and embeddings.
        """
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            tensors = load_file(folder / _WEIGHTS)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{folder}: not a readable PEFT adapter with {_WEIGHTS}: {error}") from error
        if not isinstance(config, dict) or config.get("peft_type") != "LORA" or not _number(config.get("lora_alpha")):
            raise UserError(f"{folder / CONFIG}: expected the settings of a LoRA adapter, with peft_type and lora_alpha")
        tensors = {name.removeprefix(_PREFIX): x.float() for name, x in tensors.items()}
        factors = {name: match for name in tensors if (match := _FACTOR.fullmatch(name))}
        if other := next((name for name in tensors if "lora_" in name and name not in factors), None):
            raise UserError(
                f"{folder}: {other!r} is not a factor of a linear module or an embedding; merge the adapter into the model "
                "with PEFT first"
            )
        adapter: dict[str, Factors] = {name: Dense(x) for name, x in tensors.items() if name not in factors}
        for name in dict.fromkeys(match[1] for match in factors.values()):
            part, m = _scaled(folder, config, name, tensors), tensors.get(f"{name}.lora_magnitude_vector")
            adapter[name] = part if m is None else Dora(part.b, part.a, m)
        return cls(adapter, config)


def _scaled(folder: Path, config: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor]) -> LowRank:
    names = {factor: (f"{name}.lora_{factor}.weight", f"{name}.lora_embedding_{factor}") for factor in "AB"}
    a, b = (next((tensors[key] for key in names[factor] if key in tensors), None) for factor in "AB")
    if a is None or b is None:
        raise UserError(f"{folder / _WEIGHTS}: {name} lacks one of its two factors; export the adapter again")
    pattern = config.get("alpha_pattern") or {}
    key = next((key for key in pattern if re.match(rf"(.*\.)?({key})$", name)), None)  # PEFT's rule
    alpha = float(config["lora_alpha"] if key is None else pattern[key])
    return LowRank(b=b * Scaling(alpha, bool(config.get("use_rslora"))).of(name, a.shape[0]), a=a)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0
