"""Factored aggregation compared with dense formulas: time, peak memory and error, as a Markdown table.

    python benchmarks/aggregation.py [--quick] [--write docs/benchmarks/aggregation.md]

Each measurement runs in its own process. Memory is the highest resident size during a first repetition minus the size
before it (Linux, glibc), with every block above 1 MiB returned to the system when freed, so that measurements do
not affect each other; the given factors are not counted. Time is the median of the repetitions that follow,
with freed blocks kept, as on a server that merges many modules in every round.
"""

import argparse
import ctypes
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fedlora.linalg import fit
from fedlora.linalg.als import alternate, batch_size, combined, linear
from fedlora.linalg.combine import mean, relative_error
from fedlora.linalg.fit import best_fit
from fedlora.linalg.lowrank import LowRank
from fedlora.linalg.ridge_correction import corrected
from fedlora.linalg.weighted_terms import Terms


@dataclass(frozen=True)
class Case:
    """One measurement. `factors`: "common" start with deviations, or "independent" (a flat spectrum)."""

    step: str
    modules: int
    width: int
    rank: int
    terms: int
    factors: str = "common"
    repetitions: int = 3


def made(case: Case) -> Terms:
    rng = torch.Generator().manual_seed(0)
    shapes = (case.modules, case.width, case.rank), (case.modules, case.rank, case.width)
    start = [torch.randn(s, generator=rng) if case.factors == "common" else torch.zeros(s) for s in shapes]
    drift = 0.5 if case.factors == "common" else 1.0
    drawn = [[x + drift * torch.randn(x.shape, generator=rng) for x in start] for _ in range(case.terms)]
    return [(1 / case.terms, LowRank(b=b / case.width**0.5, a=a / case.width**0.5)) for b, a in drawn]


def one_by_one(modules: int, terms: Terms, compute: Callable[[Terms], LowRank]) -> LowRank:
    done = [compute([(w, LowRank(b=f.b[i], a=f.a[i])) for w, f in terms]) for i in range(modules)]
    return LowRank(b=torch.stack([f.b for f in done]), a=torch.stack([f.a for f in done]))


def coefficients(case: Case, terms: Terms) -> LowRank:
    """As FLoRA-NA calls it: so many modules at a time."""
    size = batch_size(case.terms, case.rank, 2 * case.width)
    layers = (
        linear([(w, LowRank(b=f.b[i : i + size], a=f.a[i : i + size])) for w, f in terms])
        for i in range(0, case.modules, size)
    )
    done = [combined(layer, alternate([layer])) for layer in layers]
    return LowRank(b=torch.cat([f.b for f in done]).float(), a=torch.cat([f.a for f in done]).float())


def dense_sum(terms: Terms) -> Tensor:
    total = terms[0][0] * terms[0][1].product()
    for weight, factor in terms[1:]:
        total += weight * factor.product()
    return total


def dense_best_fit(terms: Terms, rank: int) -> LowRank:
    u, s, vt = torch.linalg.svd(dense_sum(terms))
    return LowRank(b=u[:, :rank] * s[:rank], a=vt[:rank])


def dense_correction(terms: Terms, steps: int) -> LowRank:
    """Gradient descent on 1 - cosine + 0.01 |d|^2, as in the codes derived from the official one."""
    target, center = dense_sum(terms), mean(terms)
    d = torch.zeros_like(center.b, requires_grad=True)
    optimiser = torch.optim.SGD([d], lr=0.01)
    for _ in range(steps):
        product = (center.b + d) @ center.a
        loss = 1 - torch.cosine_similarity(product.flatten(), target.flatten(), 0) + 0.01 * d.square().sum()
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
    return LowRank(b=(center.b + d).detach(), a=center.a)


def dense_coefficients(terms: Terms, steps: int) -> LowRank:
    """AdamW on the coefficients of the factors, through the dense product."""
    target = dense_sum(terms)
    b, a = (torch.stack([getattr(f, side) for _, f in terms]) for side in "ba")
    start = torch.tensor([w for w, _ in terms])
    p, q = (torch.ones_like(start, requires_grad=True) for _ in "pq")
    optimiser = torch.optim.AdamW([p, q], lr=1e-2)
    for _ in range(steps):
        product = torch.einsum("k,kor->or", start * p, b) @ torch.einsum("k,kri->ri", start * q, a)
        loss = (product - target).square().sum()
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
    p, q = p.detach() * start, q.detach() * start
    return LowRank(b=torch.einsum("k,kor->or", p, b), a=torch.einsum("k,kri->ri", q, a))


def computation(case: Case) -> tuple[Callable[[Terms], LowRank], float]:
    """What is timed, and what its time has to be multiplied with."""
    ours: dict[str, Callable[[Terms], LowRank]] = {
        "best fit": lambda terms: best_fit(terms, case.rank),
        "best fit, exact path": lambda terms: best_fit(terms, case.rank),
        "ridge": lambda terms: corrected(terms, 0.01),
        "coefficients": lambda terms: coefficients(case, terms),
    }
    if case.step in ours:
        return ours[case.step], 1.0
    if case.step == "dense best fit":
        return lambda terms: one_by_one(case.modules, terms, lambda one: dense_best_fit(one, case.rank)), 1.0
    full, solve = {"dense ridge": (1000, dense_correction), "dense coefficients": (200, dense_coefficients)}[case.step]
    steps = full // 50
    return lambda terms: one_by_one(case.modules, terms, lambda one: solve(one, steps)), full / steps


def resident(field: str) -> float:
    """MB, from the kernel's account of this process."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1024


def forgotten_peak() -> float:
    """The resident size, in MB, after free memory went back to the system and the highest size so far was forgotten."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def return_blocks_above(size: int) -> None:
    """Freed blocks of at least so many bytes go back to the system at once, smaller ones are kept."""
    libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3  # from malloc.h
    libc.mallopt(mmap_threshold, size)
    libc.mallopt(trim_threshold, 1 << 30 if size > 1 << 20 else size)


def measure(case: Case) -> dict[str, float]:
    """In the child: seconds, peak MB above the input, relative error of the result."""
    return_blocks_above(1 << 20)
    if case.step.endswith("exact path"):
        fit._affordable_steps = lambda shape, width: 0
    small = replace(case, modules=1, width=256, terms=20)
    compute, scale = computation(small)
    compute(made(small))  # loads the libraries and their buffers
    compute, scale = computation(case)
    terms, seconds = made(case), []
    before = forgotten_peak()
    result = compute(terms)
    peak = resident("VmHWM") - before
    return_blocks_above(1 << 25)  # the most that glibc takes
    for _ in range(case.repetitions):
        start = time.perf_counter()
        result = compute(terms)
        seconds.append(time.perf_counter() - start)
    error = relative_error(result, terms).mean() if scale == 1 else float("nan")
    return {"seconds": scale * statistics.median(seconds), "megabytes": peak, "error": float(error)}


@functools.cache
def in_a_child(case: Case) -> dict[str, float]:
    environment = os.environ | {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "OMP_WAIT_POLICY": "passive",  # on a busy machine, threads that spin slow the small steps down a hundredfold
    }
    command = [sys.executable, __file__, "--case", json.dumps(asdict(case))]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


def row(ours: Case, dense: Case) -> str:
    state, other = in_a_child(ours), in_a_child(dense)
    errors = [f"{x:.6f}" if x == x else "-" for x in (state["error"], other["error"])]
    cells = [
        f"{ours.modules} x {ours.width}",
        str(ours.rank),
        str(ours.terms),
        f"{ours.step} ({ours.factors})",
        f"{state['seconds']:.3f}",
        f"{other['seconds']:.2f}",
        f"{other['seconds'] / state['seconds']:.1f}",
        f"{state['megabytes']:.0f}",
        f"{other['megabytes']:.0f}",
        *errors,
    ]
    print(*cells, sep=" | ", file=sys.stderr, flush=True)
    return f"| {' | '.join(cells)} |"


def sixty_four() -> str:
    """50 terms of 64 modules 4096 x 4096 of rank 16, one module at a time."""
    seconds, peaks = 0.0, []
    for _ in range(64):
        terms = made(Case("best fit", 1, 4096, 16, 50))
        before, start = forgotten_peak(), time.perf_counter()
        best_fit(terms, 16)
        seconds += time.perf_counter() - start
        peaks.append(resident("VmHWM") - before)
    return f"64 modules 4096 x 4096, rank 16, 50 terms, sequentially: {seconds:.1f} s, peak memory {max(peaks):.0f} MB."


def report(quick: bool) -> str:
    small = [(24, 768, r, k) for r in (16, 8) for k in (10, 50, 200)]
    large = [(1, 4096, r, k) for r in (16, 8) for k in (10, 50, 200)]
    rows = []
    for modules, width, rank, terms in [(24, 768, 16, 50), (1, 4096, 16, 10)] if quick else [*large, *small]:
        shape = (modules, width, rank, terms)
        slow = Case("dense best fit", *shape, repetitions=1)
        rows.append(row(Case("best fit", *shape), slow))
        if rank == 8 or quick:
            continue
        rows.append(row(Case("best fit, exact path", *shape, repetitions=1 if terms == 200 else 3), slow))
        if terms == 50:
            flat = Case("best fit", *shape, "independent", 1)
            rows.append(row(flat, replace(flat, step="dense best fit")))
        rows.append(row(Case("ridge", *shape), Case("dense ridge", *shape, repetitions=1)))
        rows.append(row(Case("coefficients", *shape), Case("dense coefficients", *shape, repetitions=1)))
    return "\n".join(
        [
            "# Factored aggregation compared with dense formulas",
            "",
            f"Made by `benchmarks/aggregation.py{' --quick' if quick else ''}`: torch {torch.__version__}, "
            f"{torch.get_num_threads()} threads, {platform.machine()}, fp32 factors, load average at the start "
            f"{os.getloadavg()[0]:.1f}.",
            "",
            "Common: all terms started from the same factors and moved half as far at random; independent: no common part, "
            "a flat spectrum. The dense formulas are timed once, and for 4096 x 4096 only one module. The times of the "
            "dense ridge (1000 steps of SGD) and the dense coefficients (200 steps of AdamW) are extrapolated from 1/50 of "
            "the steps. MB is peak memory without the given factors. Error is relative to the sum of the products.",
            "",
            "| modules | rank | terms | step | s | dense s | ratio | MB | dense MB | error | dense error |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            *([] if quick else [sixty_four(), ""]),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small and one large case")
    parser.add_argument("--write", type=Path, help="write the table to this file instead of printing it")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.case:
        print(json.dumps(measure(Case(**json.loads(chosen.case)))))
        return
    text = report(chosen.quick)
    if chosen.write:
        chosen.write.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
