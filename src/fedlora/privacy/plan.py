"""The guarantee of a run before it begins: its releases and their epsilon."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fedlora.config.privacy import Privacy
from fedlora.privacy.account import Accountant, epsilon, noise_for, version
from fedlora.privacy.events import Gaussian, Ledger, Truncation

_QUANTILES = 5


@dataclass(frozen=True)
class Mechanism:
    """The releases about one data set: that of a client's examples, or that of all clients.

    `units` is the number of protected units in it, of which a step's sample has `expected`, and at most `largest`; `name`
    is the client's, empty for that of all clients.
    """

    name: str
    units: int
    rate: float
    noise_multiplier: float
    steps: int
    largest: int | None = None

    @property
    def expected(self) -> float:
        """The expected number of units in a sample."""
        return self.rate * self.units

    @property
    def truncation(self) -> Truncation | None:
        """The limit on a sample; None if no sample can exceed it."""
        return truncation_of(self.largest, self.units)

    def releases(self, steps: int | None = None) -> Ledger:
        """Those of this number of steps, by default of all."""
        count = self.steps if steps is None else steps
        return [Gaussian(self.noise_multiplier, self.rate, count, self.truncation)]

    def epsilon(self, delta: float, accountant: Accountant = "pld", steps: int | None = None) -> float:
        """Epsilon after this number of steps, by default after all."""
        return epsilon(self.releases(steps), delta, accountant)


@dataclass(frozen=True)
class PrivacyPlan:
    """The mechanisms of a run: those of some of the clients (record), or one (client).

    Mechanisms are in the order of their sizes. `rounds` is the largest number of rounds in which a client takes part.
    `public_counts`: whether the clients' numbers of examples are sent.
    """

    unit: Literal["record", "client"]
    clip: float
    clip_quantile: float | None
    delta: float
    rounds: int
    mechanisms: Sequence[Mechanism]
    public_counts: bool = False

    @property
    def units(self) -> int:
        """The number of units of the largest mechanism, by which delta is judged."""
        return self.mechanisms[-1].units

    @property
    def largest_delta(self) -> float:
        """The largest sensible delta: a guarantee may fail for this fraction of the units."""
        return 1 / (10 * self.units)

    def worst(self) -> Mechanism:
        """The mechanism with the largest epsilon."""
        return max(self.mechanisms, key=lambda one: one.epsilon(self.delta))

    def summary(self) -> str:
        """The guarantee in a line."""
        worst, unit = self.worst(), "example" if self.unit == "record" else "client"
        pld, rdp = (worst.epsilon(self.delta, accountant) for accountant in ("pld", "rdp"))
        return (
            f"epsilon {short(pld)} by PLD, {short(rdp)} by RDP, at delta {self.delta:g} "
            f"(n = {self.units} {_units(self.unit)}), for one {unit} added or removed; clip {short(self.clip)}; {version()}"
        )

    def by_round(self) -> dict[int, float]:
        """Epsilon of the worst mechanism after some numbers of rounds, the last of which is that of all rounds."""
        worst = self.worst()
        rounds = sorted({max(1, round(self.rounds * share)) for share in (0.01, 0.1, 0.25, 0.5, 0.75, 1.0)})
        return {done: worst.epsilon(self.delta, steps=-(-worst.steps * done // self.rounds)) for done in rounds}


def weaknesses(unit: Literal["record", "client"], delta: float, units: int, without_noise: bool) -> list[str]:
    """What weakens a guarantee whose largest data set has this number of protected units."""
    found = ["privacy.noise_multiplier = 0 gives no guarantee"] if without_noise else []
    if delta > 1 / (10 * units):
        weak = "; a mechanism that publishes one of them at random has such a delta" if delta >= 1 / units else ""
        largest = f"1 / (10 n) = {1 / (10 * units):.1e}"
        found.append(f"privacy.delta = {delta:g} is above {largest}, for n = {units} {_units(unit)}{weak}: lower it")
    return found


def record_plan(
    privacy: Privacy, rounds: int, batch_size: int, examples: Mapping[str, int], steps: Callable[[int], int]
) -> PrivacyPlan:
    """The plan of DP-SGD on clients with these numbers of examples; `steps` maps one to the steps of a participation.

    It has the clients at the quantiles of the sizes, and that with the most frequent use of its examples.
    """
    rounds = min(rounds, privacy.participations or rounds)
    uses = sorted((count, name, min(1.0, batch_size / count), rounds * steps(count)) for name, count in examples.items())
    shown = {round(i * (len(uses) - 1) / (_QUANTILES - 1)) for i in range(_QUANTILES)}
    shown.add(max(range(len(uses)), key=lambda i: uses[i][2] ** 2 * uses[i][3]))
    found = [
        Mechanism(name, count, rate, _noise(privacy, rate, total), total)
        for count, name, rate, total in (uses[i] for i in sorted(shown))
    ]
    return PrivacyPlan("record", privacy.clip, None, _delta(privacy), rounds, found, privacy.public_counts)


def client_plan(privacy: Privacy, rounds: int, fraction: float, clients: int) -> PrivacyPlan:
    """The plan of noise on the sums of the uploads of Poisson cohorts."""
    largest = privacy.largest_cohort
    noise = _noise(privacy, fraction, rounds, truncation_of(largest, clients))
    found = Mechanism("", clients, fraction, noise, rounds, largest)
    return PrivacyPlan("client", privacy.clip, privacy.clip_quantile, _delta(privacy), rounds, [found])


def truncation_of(largest: int | None, units: int) -> Truncation | None:
    """The limit on a sample of these units; None if no sample can exceed it."""
    return None if largest is None or largest >= units else Truncation(largest, units)


def short(value: float) -> str:
    """The value with four digits; a dash for NaN, if there is none."""
    return "-" if math.isnan(value) else f"{value:.4g}"


def _units(unit: Literal["record", "client"]) -> str:
    return "training examples of the largest client" if unit == "record" else "clients"


def _noise(privacy: Privacy, rate: float, steps: int, truncation: Truncation | None = None) -> float:
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    assert privacy.epsilon is not None, "checked by the section"
    return noise_for(privacy.epsilon, _delta(privacy), rate, steps, truncation)


def _delta(privacy: Privacy) -> float:
    assert privacy.delta is not None, "checked by the section"
    return privacy.delta
