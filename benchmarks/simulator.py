"""Time and memory of a simulated round, compared with a hand-written PyTorch + PEFT loop and other frameworks.

    python benchmarks/simulator.py TRAIN.jsonl.gz TEST.jsonl.gz [--repeats 3] [--parts W1 W2 accuracy scale]
                                   [--peers flower=PYTHON flower-afresh=PYTHON pfl=PYTHON]
                                   [--write docs/benchmarks/simulator.md]
    python benchmarks/simulator.py TRAIN.jsonl.gz TEST.jsonl.gz --parts W3 [--peers trl=PYTHON] ...

Work W1: 2,000 rows, 20 clients of 100 (IID), all of them in each of 3 rounds, 1 epoch, batch 8, rank 8 and alpha 16 on
query and value, AdamW with lr 1e-3, 64 tokens at most. Work W2: 1,000 clients of 8 rows, 100 of them in each of 5
rounds, one step each. Batches are in random order, except in the non-federated baseline. Hand-written baseline: one
client after the other, padded to the longest row. Non-federated baseline: the same rows in batches of 128 sorted by
length, with one adapter. Factors and head are averaged. Accuracy: W1 with lr 3e-2 and alpha 1 for 24 rounds, over
seeds. Scale: 100 clients of one row in each of 20 rounds, chosen from 100 and from 10,000. Every measurement runs in
its own process; a repetition measures every side once. Peers are other frameworks, each with the Python of its own
environment (see `peers`); their memory is that of all their processes, shared pages counted once.

Work W3 needs files with the columns `prompt` and `response`, so that it is only measured if asked for: SmolLM2 learns
the answers of 64 rows, 8 clients of 8, all of them in each of 2 rounds, batch 4, 256 tokens at most; otherwise as W1.
The non-federated baseline has batches of 8, and computes the logits of the answers only. The accuracy is that of the
answers' tokens.

Share of peak: the multiply-adds of the model's linear layers for the tokens of a round, without padding, forward and
backward to their inputs (frozen weights need no more), relative to square matrix products of the same precision in the
same time.
"""

import argparse
import json
import resource
from pathlib import Path

from simulation.sides import SIDES
from simulation.tables import PEERS, accuracy, processor, scale, speed
from simulation.works import WORKS

PARTS = ["W1", "W2", "accuracy", "scale"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, "W3"], default=PARTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the part accuracy")
    parser.add_argument("--peers", nargs="+", default=[], metavar="NAME=PYTHON", help=f"available: {', '.join(PEERS)}")
    parser.add_argument("--write", type=Path, help="write the tables to this file")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    files = [given.train, given.test]
    if given.side is not None:
        found = SIDES[given.side](files, WORKS[given.work], given.seed)
        print(json.dumps({**found, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000}))
        return
    pythons = dict(peer.split("=", 1) for peer in given.peers)
    lines: list[str] = []
    for part in given.parts:
        if part == "accuracy":
            lines += accuracy(files, given.seeds)
        elif part == "scale":
            lines += scale(files)
        else:
            lines += speed(part, files, given.repeats, pythons)
    text = "\n".join(
        [
            f"Made by `benchmarks/simulator.py`, {given.repeats} repetition{'s' * (given.repeats != 1)}, {processor()}.",
            "",
            *lines,
        ]
    )
    print(text)
    if given.write:
        given.write.write_text(f"# The simulator compared with hand-written loops\n\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
