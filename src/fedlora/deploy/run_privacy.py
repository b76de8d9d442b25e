"""Privacy of one run on a node: its own clip and noise, its ledger, and what it does not send."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedlora.config.experiment import Experiment
from fedlora.config.policy import Policy, PrivacyLimits
from fedlora.deploy.ledgered_trainer import LedgeredTrainer, ledger_errors
from fedlora.deploy.policy import budgets, own_clip, own_noise
from fedlora.deploy.privacy_ledger import BudgetSpent, PrivacyLedger, Release, data_digest, default_folder
from fedlora.deploy.settings import Settings
from fedlora.messages import ClientInfo
from fedlora.privacy.account import epsilon, noise_for
from fedlora.privacy.events import Gaussian, Truncation
from fedlora.privacy.plan import client_plan
from fedlora.rounds.client import Trainer
from fedlora.train.local import LocalTrainer
from fedlora.train.record_privacy import RecordPrivacy

_LEAST_SHARE = 0.1
"""Of the largest epsilon of one run: a run with less is not begun."""


@dataclass(frozen=True)
class RunPrivacy:
    """A run with privacy, on a node. Its methods raise a NodeFailure if a budget is spent or the ledger is damaged."""

    experiment: Experiment
    policy: Policy
    run: str
    ledger: PrivacyLedger
    notify: Callable[[str], None]

    @classmethod
    def of(cls, experiment: Experiment, settings: Settings, run: str, notify: Callable[[str], None]) -> "RunPrivacy | None":
        """The privacy of a run on a node with these settings; None if the run has none."""
        if experiment.privacy.unit == "none":
            return None
        policy, source = settings.policy or Policy(), experiment.data.source
        file = Path(source if settings.data is None else settings.data)
        data = data_digest(policy.privacy.account, file if file.is_file() else None, source)
        folder = default_folder() if policy.privacy.ledger is None else Path(policy.privacy.ledger)
        return cls(experiment, policy, run, PrivacyLedger(folder, data, composed), notify)

    def trainer(self, trainer: LocalTrainer, clients: Collection[str]) -> Trainer:
        """The trainer of these clients. For records, it has this node's clip and noise, and the ledger.

        Noise and samples are from the operating system, so that the server, which knows the run's seed, cannot repeat them.
        """
        if self.experiment.privacy.unit == "client":
            return trainer
        own = self._own({name: asked for name, asked in trainer.privacy.items() if name in clients})
        for name, privacy in own.items():
            self.notify(
                f"client {name}: clip {privacy.clip:g}, noise multiplier {privacy.noise_multiplier:.4g}, at most "
                f"{privacy.steps} steps, each on a random {privacy.rate:.3%} of the examples"
            )
        trainer = replace(trainer, privacy=own, entropy="os")
        return LedgeredTrainer(trainer, self.ledger, budgets(self.policy.privacy), self.run, own, self.notify)

    def require_budget(self, clients: Sequence[ClientInfo], trainer: Trainer) -> None:
        """Checks that the clients can take part: with one step, or, under privacy for clients, in all rounds."""
        if isinstance(trainer, LedgeredTrainer):
            releases = [self._release(name, one.noise_multiplier, one.rate, 1) for name, one in trainer.noise.items()]
        else:
            releases = self._rest_of_plan(clients)
        with ledger_errors(self.notify):
            for release in releases:
                self.ledger.check([release], budgets(self.policy.privacy))

    def before_training(self, clients: Sequence[ClientInfo]) -> None:
        """Under privacy for clients, puts all rounds of the run on the ledger: the node does not see who is chosen."""
        if self.experiment.privacy.unit == "client" and (rest := self._rest_of_plan(clients)):
            with ledger_errors(self.notify):
                self.ledger.reserve(rest, budgets(self.policy.privacy))

    def _own(self, asked: Mapping[str, RecordPrivacy]) -> dict[str, RecordPrivacy]:
        """With the noise by which the steps of all these clients, which have one account, are within this run's budget."""
        limits, steps = self._limits(), sum(one.steps for one in asked.values())
        rate = max((one.rate for one in asked.values()), default=1.0)
        return {
            name: replace(
                one,
                clip=own_clip(one.clip, limits),
                noise_multiplier=own_noise(one.noise_multiplier, rate, steps, limits, noise_for),
            )
            for name, one in asked.items()
        }

    def _limits(self) -> PrivacyLimits:
        """The policy's, of which the epsilon of one run is at most what the other runs have left of all runs' epsilon.

        Raises:
            NodeFailure: less than `_LEAST_SHARE` is left of it: with so much noise, the run would learn nothing.
        """
        limits = self.policy.privacy
        if limits.epsilon is None or limits.delta is None or limits.run_limit is None:
            return limits
        with ledger_errors(self.notify):
            others = [one for one in self.ledger.releases() if one.unit == "record" and one.run != self.run]
            spent = composed(others, limits.delta) if others else 0.0
            left = limits.epsilon - spent
            if left < _LEAST_SHARE * limits.run_limit:
                raise BudgetSpent(
                    f"the budget of all runs is epsilon {limits.epsilon:g} at delta {limits.delta:g}; other runs have "
                    f"spent {spent:.4g}, and {max(left, 0.0):.4g} is too little for a run ({self.ledger.path})"
                )
        return limits.model_copy(update={"run_epsilon": min(limits.run_limit, left)})

    def _rest_of_plan(self, clients: Sequence[ClientInfo]) -> list[Release]:
        """The releases of all rounds that are not on the ledger: all of them if the server asks for another noise, sample
        or number of clients than before, as some rounds may have been made with either."""
        asked, rate, rounds = self.experiment.privacy, self.experiment.sampling.fraction, self.experiment.rounds
        (one,) = client_plan(asked, rounds, rate, self.experiment.clients.size or 1).mechanisms
        whole = [self._release(client.id, one.noise_multiplier, rate, rounds, one.truncation) for client in clients]
        with ledger_errors(self.notify):
            found = self.ledger.releases()
        return [
            release.model_copy(update={"count": rounds - counted})
            for release in whole
            if (counted := sum(old.count for old in found if old.model_copy(update={"count": rounds}) == release)) < rounds
        ]

    def _release(
        self, client: str, noise_multiplier: float, rate: float, count: int, truncation: Truncation | None = None
    ) -> Release:
        return Release(
            run=self.run,
            client=client,
            unit="record" if self.experiment.privacy.unit == "record" else "client",
            noise_multiplier=noise_multiplier,
            rate=rate,
            count=count,
            truncation=truncation,
        )


def composed(releases: Sequence[Release], delta: float) -> float:
    """The epsilon of all releases together."""
    return epsilon([Gaussian(one.noise_multiplier, one.rate, one.count, one.truncation) for one in releases], delta)
