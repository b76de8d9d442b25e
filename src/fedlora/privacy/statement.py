"""The standard paragraph about the guarantee of a run, for model cards and reports."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedlora.printable import counted
from fedlora.privacy.account import Accountant, epsilon, version
from fedlora.privacy.events import Ledger
from fedlora.privacy.plan import PrivacyPlan, short

OF_NODES = (
    "Each client was asked to train with differential privacy for each of its examples, by DP-SGD with a clip, noise and "
    "samples that its own node determined. Epsilon and delta differ between clients, and are in the ledger of each node; "
    "the server does not know them, and cannot verify them."
)
"""The statement about records in a deployment."""

PUBLIC_COUNTS = "The clients' numbers of examples are sent, and are not protected."
"""An addition to the statement about records in a deployment, with `privacy.public_counts`."""

PERSONAL = (
    "This model has parts that were trained on one client's examples without noise: the guarantee of the run, for "
    "clients, does not cover it. It may reveal something about these examples."
)
"""The statement about a client's own adapter if clients are protected."""

WITHOUT_NOISE = "The server asked for training without noise: there is no guarantee unless a node added noise of its own."

NoiseSource = Literal["seed", "os"]

_UNIT = {"record": "example of a client", "client": "client"}
_PROTECTED = {
    "record": (
        "Protected is whether any one example was among the training examples of its client, against the server and all "
        "others who see what the client sends."
    ),
    "client": (
        "Protected is whether any one client took part, with all of its examples, against those who see the trained model; "
        "the server sees the uploads, and is trusted."
    ),
}
_NOT_PROTECTED = {
    "record": (
        "Not protected are several examples of one person together, which clients take part, their numbers of examples "
        "(which are {counts}),"
    ),
    "client": (
        "Not protected are the uploads from the server, a person with examples on several clients, adapters and scores "
        "that stay on a client, the number of clients,"
    ),
}
_CLIPPED = {
    "record": ("the gradient of each example, over all trained tensors together,", "the clipped gradients of a step"),
    "client": ("the change in each upload, over all its tensors together,", "the clipped changes of a round"),
}


@dataclass(frozen=True)
class Statement:
    """The facts of a statement.

    `spent` has what was really released about the units with the largest epsilon, if it is known. `other` names further
    releases in the account, `audit` is the result of an audit, in words.
    """

    plan: PrivacyPlan
    noise_source: NoiseSource
    spent: Ledger | None = None
    other: Sequence[str] = ()
    audit: str | None = None

    def epsilon(self, accountant: Accountant = "pld") -> float:
        """The epsilon of what was released if that is known, else of the plan."""
        if self.spent is not None:
            return epsilon(self.spent, self.plan.delta, accountant)
        return self.plan.worst().epsilon(self.plan.delta, accountant)

    def text(self) -> str:
        """The paragraph."""
        unit, counts = self.plan.unit, "sent" if self.plan.public_counts else "not sent"
        if math.isinf(self.epsilon()):
            return " ".join((self._guarantee(_UNIT[unit]), self._mechanism(*_CLIPPED[unit]), self._sampling()))
        return " ".join(
            (
                self._guarantee(_UNIT[unit]),
                _PROTECTED[unit],
                f"{_NOT_PROTECTED[unit].format(counts=counts)} settings chosen by comparing runs on the same data, and the "
                "server's test set.",
                self._mechanism(*_CLIPPED[unit]),
                self._sampling(),
                self._account(),
                *([f"The account includes {', '.join(self.other)}."] if self.other else ()),
                *([f"Audit: {self.audit}."] if self.audit is not None else ()),
                self._source(),
            )
        )

    def _guarantee(self, unit: str) -> str:
        found = self.epsilon()
        if math.isinf(found):
            return f"Without noise, there is no guarantee for any {unit}: epsilon is infinite."
        return (
            f"Differential privacy for each {unit}: epsilon = {short(found)} and delta = {self.plan.delta:g}, for "
            f"neighboring data sets in which one {unit} is added or removed, their number being public."
        )

    def _mechanism(self, what: str, terms: str) -> str:
        plan, clip = self.plan, short(self.plan.clip)
        if plan.clip_quantile is not None:
            clip += f" at first, then adapted by noisy counts to the quantile {plan.clip_quantile:g} of the norms"
        noise = _span([one.noise_multiplier for one in plan.mechanisms])
        return (
            f"Mechanism: {what} is clipped to the L2 norm {clip}; Gaussian noise of {noise} times this norm "
            f"(standard deviation) is added to the sum of {terms}, which is divided by their expected number."
        )

    def _sampling(self) -> str:
        plan, record = self.plan, self.plan.unit == "record"
        rate, expected = (_span([getattr(one, name) for one in plan.mechanisms]) for name in ("rate", "expected"))
        steps = max(one.steps for one in plan.mechanisms)
        planned = (
            f"at most {counted(steps, 'step')} of a client planned" if record else f"{counted(steps, 'round')} planned"
        )
        taken = "" if self.spent is None else f", {sum(event.count for event in self.spent)} made"
        of = "a client's examples, expected batch" if record else "the clients, expected cohort"
        largest = next((one.largest for one in plan.mechanisms), None)
        limit = "" if largest is None else f", of which at most {largest}, chosen at random, take part"
        return f"Sampling: Poisson with rate {rate} of {of} {expected}{limit}; {planned}{taken}."

    def _account(self) -> str:
        plan = self.plan
        units = "training examples of the largest client" if plan.unit == "record" else "clients"
        pld, rdp = (short(self.epsilon(accountant)) for accountant in ("pld", "rdp"))
        above = f", which is above 1 / (10 n) = {plan.largest_delta:.1g}" if plan.delta > plan.largest_delta else ""
        return (
            f"Accountant: {version()}, epsilon by PLD {pld}, by RDP {rdp}, for delta = {plan.delta:g} and n = {plan.units} "
            f"{units}{above}."
        )

    def _source(self) -> str:
        if self.noise_source == "os":
            return "Noise and samples are from the operating system, and secret; noise in floating point is not exact."
        return "Noise and samples are from the run's seed: simulation, no guarantee."


def _span(values: Sequence[float]) -> str:
    """The smallest and the largest value."""
    low, high = short(min(values)), short(max(values))
    return low if low == high else f"{low} to {high}"
