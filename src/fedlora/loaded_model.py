"""A model in memory, ready for training: adapted, and tested for packing and for several clients in one step."""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from fedlora.adapter import Scaling, lora_init
from fedlora.config.experiment import Experiment
from fedlora.linalg.lowrank import LowRank
from fedlora.models.adapted import AdaptedModel
from fedlora.models.checkpoint import Checkpoint
from fedlora.models.quantized import quantize
from fedlora.models.targets import check_ranks, head_modules, norm_modules, within
from fedlora.reuse import Reuse
from fedlora.tasks.task import Task
from fedlora.tests_at_load import conditions, tested_clients_per_step
from fedlora.train import hardware
from fedlora.train.features import try_packing


@dataclass(frozen=True)
class LoadedModel:
    """An adapted model without clients, its tokenizer, and facts about both."""

    adapted: AdaptedModel
    tokenizer: Any
    checkpoint: Checkpoint
    clients_per_step: int
    one_at_a_time: bool
    """Whether clients would influence each other in one step."""

    @classmethod
    def load(cls, task: Task, experiment: Experiment, labels: Sequence[str], reuse: Reuse | None = None) -> "LoadedModel":
        """The experiment's model on its device; with `reuse`, a copy of the one kept there, with the same weights.

        Raises:
            UserError: invalid model, targets or device, or a model that cannot be trained.
        """
        if reuse is None:
            return _load(task, experiment, labels)
        kept = reuse.get(
            "model", model_key(experiment, labels), lambda: _load(task, experiment, labels)._moved(torch.device("cpu"))
        )
        copies = {
            id(x): _copied(x) for x in kept.adapted.model.parameters() if type(x) is nn.Parameter and x.is_contiguous()
        }
        return replace(kept, adapted=deepcopy(kept.adapted, copies))._moved(hardware.device(experiment.train.device))

    @classmethod
    def for_inference(
        cls, task: Task, experiment: Experiment, labels: Sequence[str], dense: Iterable[str] = ()
    ) -> "LoadedModel":
        """The experiment's model on its device, tested for packing but not for training.

        `dense` names parameters that an adapter has without factors, which count as those of the head.

        Raises:
            UserError: invalid model, targets or device.
        """
        found, train = _adapted(task, experiment, labels, dense), experiment.train
        if train.packed:
            try_packing(found.adapted, task, found.tokenizer, train.max_length)
        return found

    def _moved(self, device: torch.device) -> "LoadedModel":
        self.adapted.model.to(device)
        return self


def _copied(x: nn.Parameter) -> nn.Parameter:
    """A copy at an address that is as aligned as that of x, which the file determines: the CPU's kernels round by it."""
    skipped = x.data_ptr() % 64 // x.element_size()
    place = torch.empty(skipped + x.numel(), dtype=x.dtype, device=x.device)[skipped:].view(x.shape)
    return nn.Parameter(place.copy_(x.detach()), x.requires_grad)


def model_key(experiment: Experiment, labels: Sequence[str]) -> str:
    """All settings on which a loaded model depends."""
    train = {"precision", "device", "packed", "clients_per_step", "gradient_checkpointing", "max_length"}
    whole = {"model", "quantize", "task", "seed", "lora"}
    settings = experiment.model_dump_json(include={**dict.fromkeys(whole, True), "train": train})
    method = experiment.method
    rank = method.rank if experiment.lora.init == "pissa" else None
    record = experiment.privacy.unit == "record"
    return f"{settings} {list(labels)} {method.with_norms} {method.whole_model} {rank} {record}"


def _load(task: Task, experiment: Experiment, labels: Sequence[str]) -> LoadedModel:
    found, settings = _adapted(task, experiment, labels), experiment.train
    whole = found.adapted.whole
    wanted = 1 if whole else settings.clients_per_step
    private = experiment.privacy.unit == "record" and not whole  # examples that share a pass are tested as those of clients
    tested = max(wanted, 2 if private else 1)
    key = chain([model_key(experiment, labels), str(tested)], conditions(found.adapted, task, experiment.model))
    safe = tested_clients_per_step(
        found.adapted, task, found.tokenizer, settings.packed, tested, settings.max_length, private, key
    )
    return replace(found, clients_per_step=min(safe, wanted), one_at_a_time=safe < tested)


def _adapted(task: Task, experiment: Experiment, labels: Sequence[str], dense: Iterable[str] = ()) -> LoadedModel:
    settings = experiment.train
    device = hardware.device(settings.device)
    model, tokenizer, checkpoint = task.load(experiment.model, labels, experiment.seed)
    head = head_modules(model, checkpoint.new)
    head += norm_modules(model, head) if experiment.method.with_norms else ()
    modules = dict(model.named_modules())
    owners = (name.rpartition(".")[0] for name in dense if not within(name, head))
    head += tuple(dict.fromkeys(owner for owner in owners if owner in modules))
    if experiment.quantize is not None:
        note = quantize(model, experiment.quantize, head)
        checkpoint = replace(checkpoint, notes=(*checkpoint.notes, note))
    model.to(device)
    adapted = AdaptedModel(
        model,
        Scaling(experiment.lora.alpha, experiment.lora.rslora),
        experiment.lora.targets,
        experiment.lora.dropout,
        experiment.lora.rank_pattern,
        head,
        torch.bfloat16 if settings.precision == "bf16" else torch.float32,
        len(labels),
        experiment.method.whole_model,
        experiment.lora.alpha_pattern,
        experiment.lora.layers,
        experiment.lora.init,
        experiment.lora.dora,
    )
    if experiment.lora.init == "pissa":  # minus the initial update, so that training starts from the pretrained model
        check_ranks(adapted.spec.modules, adapted.spec.rank_pattern, experiment.method.rank)
        start = lora_init(adapted.spec, experiment.method.rank, experiment.seed)
        adapted.keep_beside_base({name: LowRank(b=-part.b, a=part.a) for name, part in start.items()})
    if settings.gradient_checkpointing:
        adapted.checkpointing.enable()
    return LoadedModel(adapted, tokenizer, checkpoint, 1, False)
