"""The same work in Apple's pfl-research: python with_pfl.py WORK.json

In an environment of its own: pip install "pfl[pytorch]" torch transformers peft. One process with all threads.
"""

import statistics
import sys
import time
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from memory import Memory, say
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from work import Work


class Trained(torch.nn.Module):
    """What pfl trains: it gets rows, and asks for a loss."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work, self.inner = work, work.make()

    def loss(self, rows: torch.Tensor, _: Any = None) -> torch.Tensor:
        """Of a batch."""
        self.train()
        return self.work.loss(self.inner, rows.long().tolist())  # pfl makes floats of what it is given

    def metrics(self, rows: torch.Tensor, _: Any = None) -> dict[str, Weighted]:
        """Asked for in the first round; says nothing."""
        return {"examples": Weighted(len(rows), len(rows))}


class Clock(TrainingProcessCallback):
    """When each round has ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_begin(self, *, model: Any) -> Metrics:
        """The start of the first."""
        self.ends.append(time.perf_counter())
        return Metrics()

    def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
        """A round's end."""
        self.ends.append(time.perf_counter())
        return False, Metrics()


if __name__ == "__main__":
    memory, work, clock = Memory(), Work.read(sys.argv[1]), Clock()
    np.random.seed(work.seed)
    torch.manual_seed(work.seed)

    def dataset(client: int) -> Dataset:
        """The client's rows, in random order."""
        rows = np.random.permutation(np.array(work.clients[client]))
        return Dataset((rows, rows))

    users = FederatedDataset(dataset, get_user_sampler("minimize_reuse", list(range(len(work.clients)))))
    network = Trained(work)
    trained = [p for p in network.parameters() if p.requires_grad]
    model = PyTorchModel(network, partial(torch.optim.AdamW, weight_decay=0.0), torch.optim.SGD(trained, lr=1.0))
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=work.rounds,
            evaluation_frequency=work.rounds,
            train_cohort_size=work.chosen,
            val_cohort_size=None,
        ),
        SimulatedBackend(training_data=users, val_data=users, postprocessors=[WeightByDatapoints()]),
        model,
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=work.lr, local_batch_size=work.batch),
        callbacks=[clock],
    )
    seconds = statistics.median(b - a for a, b in pairwise(clock.ends))
    say(seconds=seconds, accuracy=work.accuracy(network.inner), peak_mb=memory.peak_mb)
