"""The tests of a model at load, whose results are cached."""

import hashlib
import json
import platform
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from fedlora.cache import cached
from fedlora.models.adapted import AdaptedModel
from fedlora.models.fingerprint import fingerprint
from fedlora.tasks.task import Task
from fedlora.train.features import try_packing
from fedlora.train.independence import safe_clients_per_step


def tested_clients_per_step(
    adapted: AdaptedModel,
    task: Task,
    tokenizer: Any,
    packed: bool,
    wanted: int,
    max_length: int,
    private: bool,
    key: Iterable[str],
) -> int:
    """`safe_clients_per_step`, after `try_packing` if `packed`; neither is called if the cache has their results.

    `key` has everything on which the results depend.

    Raises:
        UserError: a single client cannot be trained.
    """
    packing = adapted.packing

    def test() -> bytes:
        if packed:
            try_packing(adapted, task, tokenizer, max_length)
        clients_per_step = safe_clients_per_step(adapted, task, tokenizer, wanted, max_length, private)
        return json.dumps([packing.works, packing.narrows, clients_per_step]).encode()

    works, narrows, clients_per_step = json.loads(cached("tests at load", key, test))
    packing.enable(works, narrows)
    return int(clients_per_step)


def conditions(adapted: AdaptedModel, task: Task, source: str) -> Iterator[str]:
    """Everything on which the tests depend, apart from the settings and the labels: model files, code and machine.

    Raises:
        UserError: see `fingerprint`.
    """
    device, config = next(adapted.model.parameters()).device, getattr(adapted.model, "config", None)
    packages = {path.name for folder in sys.path for path in Path(folder).glob("*-info")}  # NAME-VERSION.dist-info
    yield json.dumps(fingerprint(source))
    yield repr(config)
    yield str(getattr(config, "_attn_implementation", None))
    yield f"{type(task).__module__}.{type(task).__qualname__}"
    yield _own_code()
    yield sys.version
    yield from sorted(packages)
    yield platform.platform()
    yield torch.__config__.show()  # version, build, and the instructions of the CPU
    yield torch.__config__.parallel_info()  # threads
    yield f"{device} {torch.cuda.get_device_properties(device) if device.type == 'cuda' else ''}"
    yield f"{torch.get_float32_matmul_precision()} {torch.are_deterministic_algorithms_enabled()}"


def _own_code() -> str:
    """Digest of the source files of this package: its version does not change with every change of an editable install."""
    folder, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}".encode())
    return digest.hexdigest()
