"""The built-in experiment with each method: accuracy, spread between clients, traffic.

    python benchmarks/methods.py [--methods fedit ffa-lora ...] [--seeds 0 1 2] [--write]

Every run is `fedlora demo` with another `method.name`, at the same learning rate. This is not a ranking of methods,
which would need a search for each. With --write the table replaces the one in README.md.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlora.api import run
from fedlora.config.experiment import build
from fedlora.config.reading import DEMO
from fedlora.methods.table import TABLE

README = Path(__file__).resolve().parents[1] / "README.md"
START, END = "<!-- results: written by benchmarks/methods.py -->\n", "<!-- end of results -->"


def runs(name: str, seeds: Sequence[int], overrides: Sequence[str]) -> list[Any]:
    """The last row of a run for each seed, and its traffic."""
    found = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            experiment = build(
                DEMO, [f"method.name={name}", f"seed={seed}", "evaluate.every=5", "evaluate.before=false", *overrides]
            )
            found.append(run(experiment, Path(folder, "run")).rows)
        print(name, seed, found[-1][-1].global_, flush=True)
    return found


def mean_and_spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def line(name: str, found: Sequence[Any]) -> str:
    last = [rows[-1] for rows in found]
    test = mean_and_spread([row.global_["accuracy"] for row in last]) if last[0].global_ is not None else "-"
    clients = [row.clients["accuracy"] for row in last]
    errors = [row.aggregation_error for rows in found for row in rows if row.aggregation_error is not None]
    error = f"{statistics.mean(errors):.1e}" if errors else "-"
    up, down = (sum(getattr(row, key) for row in found[0]) / 1e6 for key in ("bytes_up", "bytes_down"))
    return (
        f"| {name} | {TABLE[name].head} | {test} | {mean_and_spread([c.mean for c in clients])} | "
        f"{mean_and_spread([c.worst_decile for c in clients])} | {error} | {up:.1f} | {down:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(TABLE), choices=list(TABLE))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    given = parser.parse_args()
    setup = build(DEMO, given.set)
    text = "\n".join(
        [
            f"`{' --set '.join(['fedlora demo', *given.set])}` with another method: {setup.clients.size} clients, "
            f"Dirichlet {setup.clients.alpha}, rank "
            f"{setup.method.rank}, {setup.rounds} rounds of {setup.train.epochs} epoch, lr {setup.train.lr} for all (not "
            f"searched), {len(given.seeds)} seed{'s' * (len(given.seeds) != 1)}. Test: the last round's model on the "
            "global test set; held-out: on the clients' own examples; bottom decile: mean over the 10 % of clients with "
            "the lowest accuracy. Aggregation error: relative error of the aggregate, mean over the rounds. Traffic: all "
            "rounds.",
            "",
            "| method | head | test accuracy | held-out accuracy | bottom decile | aggregation error | MB up | MB down |",
            "|---|---|---|---|---|---|---|---|",
            *(line(name, runs(name, given.seeds, given.set)) for name in given.methods),
            "",
        ]
    )
    print(text)
    if given.write:
        before, _, rest = README.read_text(encoding="utf-8").partition(START)
        README.write_text(f"{before}{START}{text}{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
