"""Training on another device: what is read back from it, of which torch's meta device has nothing to give."""

from typing import Any

import pytest
import torch

from batched_jobs import TASK, jobs
from fedlora.adapter import Adapter
from fedlora.config.sections import Train
from fedlora.data.files import columns
from fedlora.models.adapted import AdaptedModel, Scaling
from fedlora.train.batched import train_together
from fedlora.train.features import try_packing

from tiny import LABELS, tiny_bert, tiny_rows


@pytest.mark.parametrize("packed", [True, False])
def test_steps_wait_for_nothing_from_the_device_but_transformers_own_question(tmp_path, monkeypatch, packed):
    model, tokenizer, _ = TASK.load(str(tiny_bert(tmp_path / "model")), LABELS, seed=0)
    table = columns(tiny_rows(tmp_path / "rows.jsonl", 44), "data.source")
    table["label"] = [LABELS.index(label) for label in table["label"]]
    adapted = AdaptedModel(model, Scaling(16.0), dropout=0.1, head=["classifier"])
    if packed:
        try_packing(adapted, TASK, tokenizer, 64)
    examples, some = TASK.encode(tokenizer, table, 64), jobs(adapted)
    model.to("meta")
    make, every, asked = torch.Generator, torch.Tensor.all, []

    def whether_all(x: torch.Tensor, *axes: Any) -> torch.Tensor:
        """transformers asks whether a batch has any padding."""
        if x.device.type != "meta":
            return every(x, *axes)
        asked.append(x.shape)
        return torch.tensor(False)

    def read(adapted: AdaptedModel, client: int, start: Adapter, train: Any) -> Adapter:
        assert all(x.device.type == "meta" for layer in adapted.layers.values() for x in vars(layer.part).values())
        return start

    monkeypatch.setattr(torch, "Generator", lambda device="cpu": make())  # there is none for meta
    monkeypatch.setattr(torch.Tensor, "all", whether_all)
    monkeypatch.setattr(AdaptedModel, "read", read)  # what is read when a client has ended
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: torch.zeros(x.shape))  # the losses at the very end
    settings = Train(batch_size=4, optimizer="sgd", clip_norm=1.0)
    trained = train_together(adapted, TASK, examples, some, settings, 100_000)
    assert [one.steps for one in trained] == [job.steps(settings) for job in some]
    assert len(asked) == max(one.steps for one in trained)
