"""Claims of published methods on BANKING77, with equal budgets and a searched learning rate: mean and spread over seeds.

    python benchmarks/claims.py a TRAIN.jsonl.gz TEST.jsonl.gz [--seeds 0 1 2] [--rounds N] [--rows N]
                                [--alphas 0.1 0.01] [--runs runs/claims.jsonl] [--write docs/benchmarks/claims.md]

30 clients under Dirichlet labels, MiniLM; within a claim the same rounds, epochs, alpha and head for all. The learning
rate of each line is the best of three on the clients' held-out examples, never on the test set, found with the first
seed. Methods evaluated on held-out examples are searched with an additional seed, which is not reported. Every run is
saved in a JSON Lines file and not repeated, so that an interrupted claim resumes; delete the file after a change of the
methods. The defaults are small, 800 of 10,003 rows and 6 rounds, so that a claim takes less than an hour on two cores.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fedlora.api import run
from fedlora.config.experiment import Experiment, build
from fedlora.federated_data import FederatedData
from fedlora.models.loading import quiet
from fedlora.rounds.row import to_json
from fedlora.runs.start import resolve_settings
from fedlora.tasks.classification import Classification

CLIENTS = 30
RATES = (1e-2, 3e-2, 1e-1)
ALPHA = 1.0
"""Of LoRA. The head has the factors' learning rate and needs a large one: MiniLM's pooled features are small. With a scale
of 16 / rank the factors would not bear that rate."""
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """One line of a table: a method with its settings, and the rank of the clients if that is not the method's."""

    label: str
    method: Mapping[str, Any]
    ranks: int | str | None = None

    def table(self) -> dict[str, Any]:
        """Its part of an experiment."""
        ranks = [self.ranks] * CLIENTS if isinstance(self.ranks, int) else self.ranks
        return {"method": dict(self.method), "clients": {} if ranks is None else {"ranks": ranks}}


@dataclass(frozen=True)
class Claim:
    """A published claim and the cases that test it, in groups: each case is compared with the first of its group."""

    says: str
    groups: tuple[tuple[Case, ...], ...]
    personal: bool = False
    by_round: bool = False


def case(name: str, rank: int, label: str = "", ranks: int | str | None = None, **settings: Any) -> Case:
    return Case(label or f"{name}, rank {rank}", {"name": name, "rank": rank, **settings}, ranks)


CLAIMS = {
    "a": Claim(
        "LoRA-A2 at rank 1 and 2 is more accurate than FedIT and FFA-LoRA at that rank, especially if the clients' data "
        "differ, with a small fraction of the upload of full fine-tuning (Koo et al. 2025).",
        tuple(
            (
                case("fedit", rank),
                case("ffa-lora", rank, head="averaged"),
                case("lora-a2", 16, f"lora-a2, rank {rank} of 16", ranks=rank, head="averaged"),
            )
            for rank in (1, 2)
        ),
    ),
    "b": Claim(
        "FlexLoRA with the rank that each client can afford is better than FedIT with the rank that the weakest client can "
        "afford (Bai et al. 2024).",
        ((case("fedit", 1), case("flexlora", 8, "flexlora, ranks 1, 2, 4, 8", ranks="uniform"), case("fedit", 8)),),
    ),
    "c": Claim(
        "Averaging b and a separately has an aggregation error, which FRA-LoRA, FLoRA, FedEx-LoRA and FLoRA-NA avoid or "
        "reduce.",
        (tuple(case(name, 4) for name in ("fedit", "fra-lora", "flora", "fedex-lora", "flora-na")),),
        by_round=True,
    ),
    "d": Claim(
        "CE-LoRA uploads a small fraction of FedIT's bytes, and its personal models are better than those of local "
        "training (Li et al. 2025).",
        ((case("local-only", 8), case("ce-lora", 8), case("fedit", 8, head="local")),),
        personal=True,
    ),
    "e": Claim(
        "FSLoRA with a part of the ranks on each client is nearly as accurate as with all ranks (Fang et al. 2025).",
        (
            (
                case("fslora", 16, "fslora, all of 16 ranks"),
                *(case("fslora", 16, f"fslora, {kept} of 16 ranks", ranks=kept) for kept in (8, 4, 2)),
                case("fedit", 2),
            ),
        ),
    ),
}


@dataclass(frozen=True)
class Session:
    """Runs each experiment once: those already in the file are not repeated."""

    files: tuple[str, str]
    rounds: int
    rows: int
    test_rows: int
    runs: Path
    alphas: Sequence[float] = (0.1, 0.01)
    """Of Dirichlet."""

    def experiment(self, one: Case, alpha: float, rate: float, seed: int) -> Experiment:
        """One run."""
        train, test = self.files
        own = one.table()
        return resolve_settings(
            build(
                {
                    "data": {"source": train, "test": test, "rows": self.rows, "test_rows": self.test_rows},
                    "seed": seed,
                    "rounds": self.rounds,
                    "clients": {"count": CLIENTS, "alpha": alpha, "min_size": 2, "held_out": 0.2, **own["clients"]},
                    "method": own["method"],
                    "lora": {"alpha": ALPHA},
                    "train": {"lr": rate, "batch_size": 4, "max_length": 64, "precision": "auto"},
                    "evaluate": {"every": self.rounds, "before": False},
                }
            )
        )

    def rows_of(self, experiment: Experiment) -> list[Row]:
        """The round log of the experiment."""
        key = experiment.to_toml()
        for known in self.kept():
            if known["experiment"] == key:
                return list(known["rows"])
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            rows = process.submit(rounds_of, experiment).result()
        self.runs.parent.mkdir(parents=True, exist_ok=True)
        with self.runs.open("a", encoding="utf-8") as file:
            file.write(f"\n{json.dumps({'experiment': key, 'rows': rows})}\n")
        return rows

    def kept(self) -> Iterator[dict[str, Any]]:
        """The runs in the file; a line that was not written to its end is passed over."""
        for line in self.runs.read_text(encoding="utf-8").splitlines() if self.runs.exists() else ():
            with suppress(json.JSONDecodeError):
                yield json.loads(line)


def rounds_of(experiment: Experiment) -> list[Row]:
    """The round log of a new run. In a process of its own: a hundred megabytes stay behind after each, and add up."""
    with tempfile.TemporaryDirectory() as folder:
        return [to_json(row) for row in run(experiment, Path(folder, "run")).rows]


def held_out(rows: Sequence[Row]) -> float:
    return float(rows[-1]["clients"]["accuracy"]["mean"])


@dataclass(frozen=True)
class Found:
    """A case's runs: the rate that was chosen, the held-out accuracy of each rate, and the rows for each seed."""

    case: Case
    rate: float
    searched: Sequence[float]
    runs: Sequence[Sequence[Row]]
    personal: bool

    def scores(self) -> list[float]:
        """What the claim is evaluated by, for each seed."""
        return [held_out(rows) if self.personal else rows[-1]["global"]["accuracy"] for rows in self.runs]

    def megabytes(self, key: str) -> float:
        """Of all rounds, with the first seed."""
        return float(sum(row[key] for row in self.runs[0])) / 1e6

    def errors(self, at: int) -> list[float]:
        """The aggregation error after so many rounds, for each seed; empty if the method has none."""
        return [rows[at - 1]["aggregation_error"] for rows in self.runs if "aggregation_error" in rows[at - 1]]


def tried(session: Session, claim: Claim, seeds: Sequence[int]) -> Iterator[tuple[float, list[Found]]]:
    """For each alpha and group of cases what came out."""
    each = len(RATES) + len(seeds) - (not claim.personal)
    todo = sum(len(group) for group in claim.groups) * len(session.alphas) * each
    started, done = time.perf_counter(), 0

    def rows(one: Case, alpha: float, rate: float, seed: int) -> list[Row]:
        nonlocal done
        made = session.rows_of(session.experiment(one, alpha, rate, seed))
        done += 1
        minutes = (time.perf_counter() - started) / 60
        about = f"{one.label}, Dirichlet {alpha}, lr {rate}, seed {seed}"
        scores = f"held-out {held_out(made):.3f}, test {made[-1].get('global', {}).get('accuracy', '-')}"
        print(f"{done} of {todo}, {minutes:.1f} min: {about}: {scores}", flush=True)
        return made

    for alpha in session.alphas:
        for group in claim.groups:
            found = []
            for one in group:
                search = max(seeds) + 1 if claim.personal else seeds[0]
                by_rate = {rate: rows(one, alpha, rate, search) for rate in RATES}
                best = max(by_rate, key=lambda rate: held_out(by_rate[rate]))
                runs = [by_rate[best] if seed == search else rows(one, alpha, best, seed) for seed in seeds]
                found.append(Found(one, best, [held_out(r) for r in by_rate.values()], runs, claim.personal))
            yield alpha, found


def mean_and_spread(values: Sequence[float], style: str = ".3f", sign: str = "") -> str:
    """Mean and standard deviation over the seeds."""
    if not values:
        return "-"
    return f"{statistics.mean(values):{sign}{style}}" + (
        f" ± {statistics.stdev(values):{style}}" if len(values) > 1 else ""
    )


def table(alpha: float, found: Sequence[Found], full: int) -> list[str]:
    """A line for each case. `full` is the size of the whole model in bytes."""
    first = found[0]
    of = "held-out accuracy" if first.personal else "test accuracy"
    lines = [
        f"Dirichlet {alpha}. Difference, and number of seeds with a higher accuracy: relative to {first.case.label}, per "
        "seed.",
        "",
        f"| method | {of} | difference | higher | held-out at each lr | lr | aggregation error | MB up | MB down | "
        "upload vs. full model |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        apart = [state - other for state, other in zip(one.scores(), first.scores(), strict=True)]
        above = f"{sum(x > 0 for x in apart)} of {len(apart)}"
        errors = [statistics.mean(each) for each in zip(*map(one.errors, range(1, len(one.runs[0]) + 1)), strict=True)]
        uploads = sum(len(row["accepted"]) for row in one.runs[0])
        cells = [
            one.case.label,
            mean_and_spread(one.scores()),
            "" if one is first else mean_and_spread(apart, sign="+"),
            "" if one is first else above,
            " / ".join(f"{score:.3f}" for score in one.searched),
            f"{one.rate:g}",
            mean_and_spread(errors, ".1e"),
            f"{one.megabytes('bytes_up'):.2f}",
            f"{one.megabytes('bytes_down'):.2f}",
            f"{one.megabytes('bytes_up') * 1e6 / (uploads * full):.3%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def by_round(found: Sequence[Found], rounds: int) -> list[str]:
    """Aggregation error by round."""
    at = sorted({1, 2, max(1, rounds // 2), rounds})
    lines = [f"| aggregation error after round | {' | '.join(map(str, at))} |", "|---" * (len(at) + 1) + "|"]
    lines += [f"| {one.case.label} | {' | '.join(mean_and_spread(one.errors(i), '.1e') for i in at)} |" for one in found]
    return [*lines, ""]


def report(name: str, session: Session, seeds: Sequence[int]) -> str:
    claim = CLAIMS[name]
    any_one = session.experiment(claim.groups[0][0], session.alphas[0], RATES[0], seeds[0])
    full = bytes_of_the_model(any_one)
    lines = []
    for alpha, found in tried(session, claim, seeds):
        lines += table(alpha, found, full)
        lines += by_round(found, session.rounds) if claim.by_round else []
    train, searched = any_one.train, "an additional seed" if claim.personal else f"seed {seeds[0]}"
    size = (
        f"{session.rows} training rows, a fifth of them held out; {session.test_rows} test rows; {CLIENTS} clients, all in "
        f"each of {session.rounds} rounds of {train.epochs} epoch; batches of {train.batch_size}, {train.optimizer}, alpha "
        f"{ALPHA:g}, {train.precision}; lr of {', '.join(map(str, RATES))}, searched with {searched}; means ± standard "
        f"deviations over the seeds {', '.join(map(str, seeds))}. Traffic: all rounds with the first seed, including the "
        f"head, which is {'local' if claim.personal else 'averaged'} for all methods."
    )
    return "\n".join([f"## Claim {name}", "", claim.says, "", f"Setup: {size}", "", *lines])


def bytes_of_the_model(experiment: Experiment) -> int:
    """Upload of a client in full fine-tuning."""
    labels = FederatedData.make(experiment).labelled_data.labels
    quiet()
    model, _, _ = Classification().load(experiment.model, labels, experiment.seed)
    return sum(x.numel() * 4 for x in model.parameters())


def put(file: Path, name: str, text: str) -> None:
    """Writes the claim's section into the file, replacing an older one."""
    start, end = f"<!-- claim {name} -->\n", f"<!-- end of claim {name} -->\n"
    title = "# Claims of published methods, tested\n\nWritten by `benchmarks/claims.py`.\n\n"
    before, found, rest = (file.read_text(encoding="utf-8") if file.exists() else title).partition(start)
    after = rest.partition(end)[2] if found else ""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{before}{start}{text}{end}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claim", choices=list(CLAIMS))
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--alphas", nargs="+", type=float, default=[0.1, 0.01], help="of Dirichlet")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--test-rows", type=int, default=1000)
    parser.add_argument("--runs", type=Path, default=Path("runs/claims.jsonl"), help="the file that keeps the runs")
    parser.add_argument("--write", type=Path, help="put the section into this file")
    given = parser.parse_args()
    session = Session((given.train, given.test), given.rounds, given.rows, given.test_rows, given.runs, given.alphas)
    text = report(given.claim, session, given.seeds)
    print(text)
    if given.write:
        put(given.write, given.claim, text)


if __name__ == "__main__":
    main()
