"""What every side of `benchmarks/simulator.py` but the product itself trains with: plain PyTorch, transformers and PEFT.

Knows nothing of fedlora, so that other frameworks can import it in environments of their own.
"""

import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Work:
    """Token ids and labels of all training and test examples, the rows of each client, and how they are trained."""

    model: str
    classes: int
    ids: Sequence[Sequence[int]]
    labels: Sequence[int]
    test_ids: Sequence[Sequence[int]]
    test_labels: Sequence[int]
    clients: Sequence[Sequence[int]]
    chosen: int
    rounds: int
    lr: float
    alpha: float
    rank: int
    batch: int
    seed: int

    def write(self, file: Path) -> None:
        """As JSON."""
        file.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(file: str | Path) -> "Work":
        """What `write` wrote."""
        return Work(**json.loads(Path(file).read_text(encoding="utf-8")))

    def make(self, dtype: torch.dtype = torch.float32) -> PeftModel:
        """The model with a fresh adapter on query and value."""
        torch.manual_seed(self.seed)
        base = AutoModelForSequenceClassification.from_pretrained(self.model, num_labels=self.classes, dtype=dtype)
        lora = LoraConfig(task_type="SEQ_CLS", r=self.rank, lora_alpha=self.alpha, target_modules=["query", "value"])
        return get_peft_model(base, lora, autocast_adapter_dtype=False)

    def train(self, model: PeftModel, batches: Sequence[torch.Tensor]) -> None:
        """One client's work, with an optimiser of its own."""
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.lr, weight_decay=0.0)
        labels = torch.tensor(self.labels)
        model.train()
        for rows in batches:
            loss = cross_entropy(model(**padded([self.ids[row] for row in rows.tolist()])).logits, labels[rows])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def shuffled(self, client: int) -> list[torch.Tensor]:
        """The client's rows in batches, in random order."""
        rows = torch.tensor(self.clients[client])
        return list(torch.split(rows[torch.randperm(len(rows))], self.batch))

    def accuracy(self, model: PeftModel) -> float:
        """On the test examples."""
        model.eval()
        labels, right = torch.tensor(self.test_labels), 0
        with torch.inference_mode():
            for rows in torch.split(torch.arange(len(labels)), 64):
                found = model(**padded([self.test_ids[row] for row in rows.tolist()])).logits.argmax(-1)
                right += int((found == labels[rows]).sum())
        return right / len(labels)


def padded(ids: Sequence[Sequence[int]]) -> State:
    """A batch as the model takes it."""
    tokens = pad_sequence([torch.tensor(one) for one in ids], batch_first=True)
    return {"input_ids": tokens, "attention_mask": (tokens != 0).long()}


def state(model: PeftModel) -> State:
    """A copy of the adapter and the head."""
    return {name: x.detach().clone() for name, x in get_peft_model_state_dict(model).items()}


def put(model: PeftModel, adapter: State) -> None:
    set_peft_model_state_dict(model, adapter)


class Memory(threading.Thread):
    """Watches what this process and all that it started have in memory, shared pages counted once."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_mb = 0.0
        self.start()

    def run(self) -> None:
        """Looks twice a second."""
        while True:
            self.peak_mb = max(self.peak_mb, sum(map(_mb, _family())))
            time.sleep(0.5)


def _family() -> list[int]:
    """This process and its descendants."""
    parents = {}
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            parents[int(pid)] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    family = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return list(family)


def _mb(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1000 for line in lines if line.startswith("Pss:")), 0.0)


def say(**found: float) -> None:
    """The last line that a measured process prints."""
    print(json.dumps(found), flush=True)
