"""The same work in Flower's simulation engine, which runs on Ray: python with_flower.py WORK.json [afresh]

In an environment of its own: pip install "flwr[simulation]>=1.41,<1.43" torch transformers peft. A worker process for each
core, of one thread. Each keeps the model that it has loaded once; with `afresh`, every client loads it in every round, as
Flower's own examples for transformers do. The data stay in memory either way.
"""

import os
import statistics
import sys
import time
from itertools import pairwise

from flower_client import AFRESH, WORK, app
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from memory import Memory, say
from work import Work, put, state

server = ServerApp()
work = Work.read(sys.argv[1])
ends: list[float] = []
final: list[float] = []


@server.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds; when each has ended, and what the last model can do."""
    strategy = FedAvg(fraction_train=work.chosen / len(work.clients), fraction_evaluate=0.0)
    model = work.make()

    def after(index: int, arrays: ArrayRecord) -> None:
        ends.append(time.perf_counter())

    result = strategy.start(grid, ArrayRecord(state(model)), work.rounds, evaluate_fn=after)
    put(model, result.arrays.to_torch_state_dict())
    final.append(work.accuracy(model))


if __name__ == "__main__":
    memory = Memory()
    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", WORK: sys.argv[1]}
    if sys.argv[2:] == ["afresh"]:
        os.environ[AFRESH] = "1"
    cores = len(os.sched_getaffinity(0))
    backend = {"client_resources": {"num_cpus": 1.0, "num_gpus": 0.0}, "init_args": {"num_cpus": cores}}
    run_simulation(server, app, len(work.clients), backend_config=backend)
    say(seconds=statistics.median(b - a for a, b in pairwise(ends)), accuracy=final[0], peak_mb=memory.peak_mb)
