"""A privacy plan, as tables and as JSON."""

import json
import math
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fedlora.printable import printable
from fedlora.privacy.account import version
from fedlora.privacy.plan import PrivacyPlan, short, weaknesses


def warnings(plan: PrivacyPlan) -> list[str]:
    """What weakens the guarantee."""
    return weaknesses(plan.unit, plan.delta, plan.units, math.isinf(plan.worst().epsilon(plan.delta)))


def table(plan: PrivacyPlan) -> Group:
    """The mechanisms, epsilon by rounds, and the guarantee in a line."""
    mechanisms = _table("client", "examples") if plan.unit == "record" else _table("clients")
    limited = any(one.largest is not None for one in plan.mechanisms)
    for name in ("rate", "expected", *(["largest"] if limited else []), "noise multiplier", "steps", "epsilon"):
        mechanisms.add_column(name, justify="right")
    for one in plan.mechanisms:
        who = [printable(one.name), str(one.units)] if plan.unit == "record" else [str(one.units)]
        sample = [short(one.rate), short(one.expected), *([str(one.largest)] if limited else [])]
        used = [short(one.noise_multiplier), str(one.steps), short(one.epsilon(plan.delta))]
        mechanisms.add_row(*map(Text, who), *sample, *used)
    rounds = _table()
    rounds.add_column("after round" if plan.unit == "client" else "rounds of a client", justify="right")
    rounds.add_column("epsilon", justify="right")
    for done, epsilon in plan.by_round().items():
        rounds.add_row(str(done), short(epsilon))
    return Group(mechanisms, rounds, Text(plan.summary()))


def to_json(plan: PrivacyPlan) -> str:
    """An object in one line of strict JSON: numbers that are not finite are null."""
    worst = plan.worst()
    found = {
        "unit": plan.unit,
        "epsilon": _finite(worst.epsilon(plan.delta)),
        "epsilon_rdp": _finite(worst.epsilon(plan.delta, "rdp")),
        "delta": plan.delta,
        "largest_delta": plan.largest_delta,
        "units": plan.units,
        "clip": plan.clip,
        "accountant": version(),
        "mechanisms": [{**vars(one), "epsilon": _finite(one.epsilon(plan.delta))} for one in plan.mechanisms],
        "rounds": [{"round": done, "epsilon": _finite(epsilon)} for done, epsilon in plan.by_round().items()],
        "warnings": warnings(plan),
    }
    return json.dumps(found, allow_nan=False)


def _table(*columns: str) -> Table:
    return Table(*columns, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))


def _finite(value: float) -> Any:
    return value if math.isfinite(value) else None
