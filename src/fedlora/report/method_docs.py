"""Markdown pages of the methods, from the method table, the class docstrings and published results.

    python -m fedlora.report.method_docs docs/methods

writes the pages and an index.
"""

import inspect
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

from fedlora.adapter import Init
from fedlora.methods.row import Row
from fedlora.methods.table import TABLE
from fedlora.report.guarantees import guarantee
from fedlora.report.published_results import Claim, Study, reported

_MADE = "<!-- written by scripts/pages -->"
_READ = {
    "paper": "source: paper",
    "abstract": "source: abstract of the paper",
    "code": "source: the authors' repository",
    "secondary": "secondary source, not the paper",
}
_LEGEND = """\
Floats are for each adapted layer, client and round, without the head: r is the client's rank, `rank` the largest one, in
and out are the layer's sizes, K is the number of the round's clients, R the sum of their ranks. With *positions* a client
also sends the indices of these ranks or entries. With DoRA, averaged magnitudes add out floats down, and up in the rounds
that train b; local ones stay on the client; no average is exact. A *base update* is a change of the base model, sent in
addition. *Secure aggregation* reveals only sums of uploads to the server. *Differential privacy* (DP) is supported for
records, `privacy.unit = "record"`, or for clients, `"client"`, as the method is set by default or with the named setting
(docs/privacy.md)."""
_INDEX = """\
*PiSSA*: whether the method can start from the principal parts of the pretrained weights, `lora.init = "pissa"`.

Each page ends with published results and their sources. Figures from secondary sources may contain errors. Compare with
care:

- Some results are of the best round, selected on the evaluation data, others of the last round.
- Personal models, evaluated on the clients' own data, are not comparable to a global model on a common test set.
- The baselines fedit and ffa-lora differ by up to twenty points, in either direction. Learning rate, number of clients,
  head and rank have a larger effect than the method; `benchmarks/claims` keeps them equal, or searches them."""


def page(row: Row) -> str:
    """Page of one method."""
    settings = {**row.settings(), "head": row.head, "norms": row.norms, "weights": row.weights}
    parts = [
        f"# {row.name}",
        f"{row.summary[0].upper()}{row.summary[1:]}.",
        f"Paper: {_linked(row.paper)}. To use it: `--set method.name={row.name}`.",
        _table(["question", "answer"], _facts(row).items()),
        _LEGEND,
        "## How it works here",
        inspect.cleandoc(row.make.__doc__ or ""),
        "## Settings",
        "\n".join(f"- `{key} = {value!r}`" for key, value in settings.items()),
        *_exceptions(row),
        *_results(row.name),
    ]
    return "\n\n".join(parts) + "\n"


def index() -> str:
    """Table of all methods, with an explanation."""
    titles = [
        "method",
        "exact",
        "mixed ranks",
        "personal",
        "PiSSA",
        "floats up",
        "floats down",
        "needs each upload",
        "secure",
        "DP, records",
        "DP, clients",
    ]
    return "\n\n".join(["# Methods", _table(titles, map(_line, TABLE.values())), _LEGEND, _INDEX]) + "\n"


def texts() -> dict[str, str]:
    """Maps file names to texts."""
    made = {"README.md": index()} | {f"{name}.md": page(row) for name, row in TABLE.items()}
    return {name: f"{_MADE}\n\n{text}" for name, text in made.items()}


def write(folder: Path) -> None:
    """Writes the index and a page for each method; removes pages of methods that no longer exist."""
    folder.mkdir(parents=True, exist_ok=True)
    made = texts()
    for old in folder.glob("*.md"):
        if old.name not in made:
            old.unlink()
    for name, text in made.items():
        (folder / name).write_text(text, encoding="utf-8")


def short(answer: str) -> str:
    """Returns the value without its explanation."""
    return answer.partition(":")[0]


def yes(flag: bool) -> str:
    """Formats a flag as a word."""
    return "yes" if flag else "no"


def _facts(row: Row) -> dict[str, str]:
    return {
        "exact mean of the updates": row.exact,
        "clients with different ranks": yes(row.mixed_ranks),
        "personal models": yes(row.personal),
        "initial factors (`lora.init`)": _inits(row),
        **({"weight decay": f"must be 0: {row.no_weight_decay}"} if row.no_weight_decay else {}),
        "floats up": _floats(row.up, row.index_counts is not None),
        "floats down": _floats(row.down, row.index_counts_down is not None),
        **({} if row.first_upload[0] == "0" else {"floats up once, for all layers together": f"`{row.first_upload[0]}`"}),
        "DoRA (`lora.dora`)": f"yes: magnitudes are {row.magnitudes}" if row.magnitudes else "no",
        "floats of a base update": "none" if row.base_update == "0" else f"`{row.base_update}`",
        "server needs individual uploads": yes(row.needs_individual_uploads),
        "secure aggregation": row.secure_sums(),
        "differential privacy for records": guarantee(row, "record"),
        "differential privacy for clients": guarantee(row, "client"),
        **({"noise of differential privacy": row.noise} if row.noise else {}),
    }


def _line(row: Row) -> list[str]:
    up, down = _floats(row.up, row.index_counts is not None), _floats(row.down, row.index_counts_down is not None)
    return [
        f"[{row.name}]({row.name}.md)",
        short(row.exact),
        yes(row.mixed_ranks),
        yes(row.personal),
        yes(row.rejects_init("pissa") is None),
        up,
        down if row.base_update == "0" else f"{down} and base updates",
        yes(row.needs_individual_uploads),
        short(row.secure_sums()),
        short(guarantee(row, "record")),
        short(guarantee(row, "client")),
    ]


def _inits(row: Row) -> str:
    if row.init == "own":
        return "the method's own"
    return ", ".join(f"`{init}`" for init in get_args(Init) if row.rejects_init(init) is None)


def _floats(formulas: Iterable[str], picked: bool) -> str:
    return ", then ".join(f"`{formula}`" for formula in formulas) + (" and positions" if picked else "")


def _exceptions(row: Row) -> list[str]:
    """Laws of the conformance suite that do not hold for the method."""
    laws = [f"- {law.removeprefix('test_').replace('_', ' ')}: {reason}" for law, reason in row.known_failures.items()]
    return ["## Laws that do not hold", "\n".join(laws)] if laws else []


def _results(name: str) -> list[str]:
    told = [claim for claim in reported().claim if name in claim.about]
    studies = [study for study in reported().study if name in study.about]
    others = [study for study in reported().study if name in study.values and name not in study.about]
    elsewhere = {other for study in others for other in study.about}
    links = ", ".join(f"[{other}]({other}.md)" for other in TABLE if other in elsewhere)
    parts = [
        *(["\n".join(f"- {claim.claim} {_origin(claim)}" for claim in told)] if told else []),
        *(block for study in studies for block in _study(study, name)),
        *([f"Also a baseline on the pages of {links}."] if links else []),
    ]
    return ["## Published results", *parts] if parts else []


def _study(study: Study, name: str) -> list[str]:
    lines = [
        [f"**{label}**" if method == name else label, *("-" if x.is_nan() else str(x) for x in values)]
        for method, values in study.values.items()
        for label in [reported().label(method)]
    ]
    about = ", ".join(filter(None, (study.model, study.setting)))
    return [f"{about}; {study.metric}. {_origin(study)}", _table(["", *study.benchmarks], lines)]


def _origin(entry: Study | Claim) -> str:
    caveat = f" {entry.caveat}" if entry.caveat else ""
    return f"({_linked(entry.source)}; {_READ[entry.read]}.{caveat})"


def _linked(source: str) -> str:
    source = re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", source)
    return re.sub(r"openreview (\w+)", r"[openreview](https://openreview.net/forum?id=\1)", source)


def _table(titles: list[str], lines: Iterable[Iterable[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (titles, ["---"] * len(titles), *lines))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
