"""What every side of `benchmarks/simulator.py` but the product itself trains with: plain PyTorch, transformers and PEFT.

Knows nothing of fedlora, so that other frameworks can import it in environments of their own.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

State = dict[str, torch.Tensor]
IGNORED = -100


@dataclass(frozen=True)
class Work:
    """Token ids and labels of all training and test examples, the rows of each client, and how they are trained.

    In a classification an example has one label, in a causal-lm each of its tokens has, `IGNORED` if it is not learned.
    """

    kind: Literal["classification", "causal-lm"]
    model: str
    classes: int
    pad: int
    targets: Sequence[str]
    ids: Sequence[Sequence[int]]
    labels: Sequence[Any]
    test_ids: Sequence[Sequence[int]]
    test_labels: Sequence[Any]
    clients: Sequence[Sequence[int]]
    chosen: int
    rounds: int
    lr: float
    alpha: float
    rank: int
    batch: int
    eval_batch: int
    seed: int
    device: str = "cpu"

    def write(self, file: Path) -> None:
        """As JSON."""
        file.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(file: str | Path) -> "Work":
        """What `write` wrote."""
        return Work(**json.loads(Path(file).read_text(encoding="utf-8")))

    def source(self) -> tuple[str, dict[str, str]]:
        """The first argument of `from_pretrained`, and further ones."""
        file = Path(self.model)
        return (str(file.parent), {"gguf_file": file.name}) if file.suffix == ".gguf" else (self.model, {})

    def make(self, dtype: torch.dtype = torch.float32) -> PeftModel:
        """The model with a fresh adapter on query and value."""
        torch.manual_seed(self.seed)
        if self.kind == "classification":
            task, more = "SEQ_CLS", {"num_labels": self.classes}
            base = AutoModelForSequenceClassification.from_pretrained(self.model, dtype=dtype, **more)
        else:
            task, (folder, more) = "CAUSAL_LM", self.source()
            base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **more)
        lora = LoraConfig(task_type=task, r=self.rank, lora_alpha=self.alpha, target_modules=list(self.targets))
        return get_peft_model(base, lora, autocast_adapter_dtype=False).to(self.device)

    def train(self, model: PeftModel, batches: Sequence[torch.Tensor], lean: bool = False) -> None:
        """One client's work, with an optimiser of its own."""
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.lr, weight_decay=0.0)
        model.train()
        for rows in batches:
            (self.lean_loss if lean else self.loss)(model, rows.tolist()).backward()
            optimizer.step()
            optimizer.zero_grad()

    def loss(self, model: torch.nn.Module, rows: Sequence[int]) -> torch.Tensor:
        """The mean loss of these training examples, as one would write it."""
        inputs = self.padded([self.ids[row] for row in rows])
        labels = self._labels([self.labels[row] for row in rows])
        if self.kind == "classification":
            return cross_entropy(model(**inputs).logits, labels)
        return model(**inputs, labels=labels, use_cache=False).loss

    def lean_loss(self, model: PeftModel, rows: Sequence[int]) -> torch.Tensor:
        """The same with the logits of the learned tokens only, and no mask, as the padding follows all that is read."""
        if self.kind == "classification":
            return self.loss(model, rows)
        whole = model.get_base_model()
        inputs = self.padded([self.ids[row] for row in rows])
        wanted = self._labels([self.labels[row] for row in rows]).roll(-1, 1)
        at = wanted != IGNORED  # the first token has no label
        hidden = whole.get_decoder()(input_ids=inputs["input_ids"], use_cache=False).last_hidden_state
        return cross_entropy(whole.get_output_embeddings()(hidden[at]).float(), wanted[at])

    def shuffled(self, client: int) -> list[torch.Tensor]:
        """The client's rows in batches, in random order."""
        rows = torch.tensor(self.clients[client])
        return list(torch.split(rows[torch.randperm(len(rows))], self.batch))

    def accuracy(self, model: PeftModel) -> float:
        """The fraction of the test examples, or of their learned tokens, that are predicted."""
        model.eval()
        right, count = 0, 0
        with torch.inference_mode():
            for rows in torch.split(torch.arange(len(self.test_ids)), self.eval_batch):
                found = model(**self.padded([self.test_ids[row] for row in rows.tolist()])).logits.argmax(-1)
                labels = self._labels([self.test_labels[row] for row in rows.tolist()])
                if self.kind == "causal-lm":
                    found, labels = found[:, :-1], labels[:, 1:]
                right += int((found == labels).sum())
                count += int((labels != IGNORED).sum())
        return right / count

    def padded(self, ids: Sequence[Sequence[int]]) -> State:
        """A batch as the model takes it."""
        tokens = pad_sequence([torch.tensor(one) for one in ids], batch_first=True, padding_value=self.pad)
        mask = torch.arange(tokens.shape[1]) < torch.tensor([len(one) for one in ids])[:, None]
        return {"input_ids": tokens.to(self.device), "attention_mask": mask.long().to(self.device)}

    def _labels(self, labels: Sequence[Any]) -> torch.Tensor:
        each = [torch.tensor(one) for one in labels]
        if self.kind == "classification":
            return torch.stack(each).to(self.device)
        return pad_sequence(each, batch_first=True, padding_value=IGNORED).to(self.device)


def state(model: PeftModel) -> State:
    """A copy of the adapter and the head."""
    return {name: x.detach().clone() for name, x in get_peft_model_state_dict(model).items()}


def put(model: PeftModel, adapter: State) -> None:
    set_peft_model_state_dict(model, adapter)
