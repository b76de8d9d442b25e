"""Audits of experiments: training with canaries, and what it shows about them."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from fedlora.adapter import Adapter
from fedlora.canaries import Canaries, client_canaries, example_canaries
from fedlora.config.experiment import Experiment
from fedlora.errors import UserError
from fedlora.federated_data import FederatedData
from fedlora.lifecycle import begin, rounds
from fedlora.messages import ClientInfo, Round
from fedlora.method import global_adapter
from fedlora.planning import plan_of
from fedlora.privacy.audit import Audit, judge
from fedlora.rounds.plan import RunState
from fedlora.rounds.progress import NullProgress
from fedlora.runs.folder import RunFolder
from fedlora.runs.start import resolve_settings
from fedlora.session import Session
from fedlora.train.local import LocalTrainer

_DELTA = 1e-5  # without privacy.delta


@dataclass(frozen=True)
class ExperimentAudit:
    """The result of an audit, and the epsilon that is claimed for its canaries; infinite without differential privacy.

    `planned` is that of the experiment without canaries, of the client with the largest one. Canaries change the number of
    units, and thus rates and noise.
    """

    unit: Literal["record", "client"]
    found: Audit
    claimed: float
    planned: float

    @property
    def exceeds(self) -> bool:
        """Whether the lower bound contradicts the claim."""
        return self.found.bound > self.claimed

    @property
    def can_exceed(self) -> bool:
        """Whether the lower bound would contradict the claim if all guesses were correct."""
        return self.found.ceiling > self.claimed

    def text(self) -> str:
        """The result in words."""
        what = "examples of a client" if self.unit == "record" else "clients"
        claim = f"{self._claim()}, at delta {self.found.delta:g}"
        return "; ".join([f"canaries are {what}", self.found.text(), claim, *self.limits()])

    def _claim(self) -> str:
        if math.isinf(self.claimed):
            return "claimed epsilon none"
        claim = f"claimed epsilon {self.claimed:.4g}"
        if self.claimed == self.planned:
            return claim
        return f"{claim} with the canaries among the data ({self.planned:.4g} for the experiment without)"

    def limits(self) -> Iterator[str]:
        """Yields that the audit is too small for its claim, if it is."""
        if not self.can_exceed and math.isfinite(self.claimed):
            yield (
                f"with {self.found.guesses} guesses the bound is at most {self.found.ceiling:.2f}, which cannot contradict "
                f"the claimed epsilon {self.claimed:.4g}: raise --canaries or --guesses"
            )

    def to_json(self) -> str:
        """An object in one line of strict JSON; `claimed` and `planned` are null if they are infinite."""
        found = {
            "unit": self.unit,
            "bound": self.found.bound,
            "ceiling": self.found.ceiling,
            "can_exceed": self.can_exceed,
            "claimed": _finite(self.claimed),
            "planned": _finite(self.planned),
            **vars(self.found),
        }
        return json.dumps(found, allow_nan=False)


def audit(
    experiment: Experiment,
    canaries: int = 200,
    guesses: int | None = None,
    *,
    data: Any = None,
    notify: Callable[[str], None] = lambda note: None,
) -> ExperimentAudit:
    """Trains the experiment with canaries, and guesses from their losses before and after which ones were included.

    Canaries are clients with `privacy.unit = "client"`, else examples of the smallest client.

    Args:
        experiment: the settings; clients are not evaluated.
        canaries: the number of canaries; a fair coin includes each.
        guesses: the number of guesses on each side, by default a tenth of the canaries.
        data: as in `run`.
        notify: is called with messages about the examples, and if the audit is too small for its claim.

    Raises:
        UserError: invalid settings or data, or a task or method that cannot be audited.
        RunStopped: the training cannot continue.
    """
    each = max(1, canaries // 10) if guesses is None else guesses
    if not 1 <= each <= canaries // 2:
        raise UserError(f"expected 1 to {canaries // 2} guesses on each side for {canaries} canaries, found {each}")
    unit: Literal["record", "client"] = "client" if experiment.privacy.unit == "client" else "record"
    if unit == "client" and experiment.method.row.personal:
        raise UserError(f"method.name = {experiment.method.name!r}: an audit of clients needs a global model")
    experiment = _without_evaluation(resolve_settings(experiment))
    federated_data = FederatedData.make(experiment, data)
    plant = client_canaries if unit == "client" else example_canaries
    planted = plant(experiment, federated_data, canaries)
    session = Session.make(experiment, planted.data)
    delta, claims = experiment.privacy.delta or _DELTA, _claims(session, planted)
    best = ExperimentAudit(unit, Audit(canaries, 2 * each, 2 * each, delta), *claims)
    for note in (*session.notes, *best.limits()):
        notify(note)
    with TemporaryDirectory() as home:
        folder = RunFolder.create(Path(home) / "run")
        try:
            start = begin(session, folder)
            before = _losses(session, _view(session, folder, start.run_state, 0, planted), planted)
            after_rounds = rounds(session, folder, NullProgress(), session.simulation(folder), start)
            adapter = _view(session, folder, after_rounds, experiment.rounds, planted)
            scores = before - _losses(session, adapter, planted)
        finally:
            folder.release()
    return ExperimentAudit(unit, judge(scores, planted.included, each, delta), *claims)


def _claims(session: Session, planted: Canaries) -> tuple[float, float]:
    """The planned epsilon of the canaries' client, or of all clients; and that of the experiment without canaries."""
    assert isinstance(session.trainer, LocalTrainer)
    first = min(row for rows in planted.rows for row in rows)
    sizes = {client: len(rows) for client, rows in session.trainer.rows.items()}
    own = {client: int((rows < first).sum()) for client, rows in session.trainer.rows.items()}
    claimed = sizes if planted.client is None else {planted.client.id: sizes[planted.client.id]}
    return _epsilon(session.experiment, claimed), _epsilon(session.experiment, {x: n for x, n in own.items() if n})


def _epsilon(experiment: Experiment, sizes: Mapping[str, int]) -> float:
    plan = plan_of(experiment, sizes)
    return math.inf if plan is None else plan.worst().epsilon(plan.delta)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _without_evaluation(experiment: Experiment) -> Experiment:
    changes = {"every": experiment.rounds, "before": False, "clients": "none", "generate": 0, "stop_after": None}
    return experiment.model_copy(update={"evaluate": experiment.evaluate.model_copy(update=changes)})


def _view(session: Session, folder: RunFolder, state: RunState, done: int, planted: Canaries) -> Adapter:
    """The adapter after some rounds of the client with canaries, or of anybody."""
    rnd = Round(done, session.experiment.seed)
    if (client := planted.client) is None:
        return global_adapter(session.method, session.adapted.spec, state.server, rnd)
    return session.simulation(folder).view(client, session.method.send(state.server, client, rnd), rnd)


def _losses(session: Session, adapter: Adapter, planted: Canaries) -> torch.Tensor:
    """The mean loss of each canary's examples [canaries]."""
    trainer = session.trainer
    assert isinstance(trainer, LocalTrainer)
    asked = [(ClientInfo(str(i), 1, 1), adapter) for i in range(len(planted.rows))]
    trainer = replace(trainer, held_out={str(i): torch.tensor(list(rows)) for i, rows in enumerate(planted.rows)})
    scores = trainer.scores(asked)
    return torch.tensor([math.nan if one is None else session.task.metrics(one)["loss"] for one in scores])
