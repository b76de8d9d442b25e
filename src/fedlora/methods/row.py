"""One row of the table of methods."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from fedlora.adapter import Init
from fedlora.method import AnyMethod

Head = Literal["frozen", "averaged", "local", "method-managed"]
Weights = Literal["examples", "uniform"]


@dataclass(frozen=True)
class Row:
    """One method: its constructor, source, traffic and properties.

    `up` and `down` are formulas for the floats per adapted layer, client and round, without the head. Variables are r
    (the client's rank), in, out, the method's settings such as `rank`, and E, the number of experts, which depends on
    the clients' data. If traffic depends on the round, the formulas of a tuple are repeated cyclically. `base_update`
    is the formula for the base update that is sent, in addition to `down`, to a client that participated in the
    previous round; its further variables are K, the number of the round's clients, and R, the sum of their ranks. For a
    method that sends selected values and their positions, `index_counts` and `index_counts_down` are the numbers of
    selected and of all values, per layer; they determine the bytes of the positions (`linalg.sparse.position_bytes`),
    which are sent in addition to the floats.

    `first_upload` has the formulas for the floats, and for the bytes of integers, that a client uploads in addition to
    `up` in its first participation, for all layers together. Further variables are `features` and `classes`, the width
    of the model's last layer and the number of labels. They apply to clients that have all labels.

    `head` is the default head rule; with "method-managed" the method itself handles the head, and sends it with the
    factors.

    `norms`: whether the layer norms are part of the head by default, as they are trained in the paper.

    `init`: the initial factors that the method can start from: any, such as the principal parts of the weights, which need
    both factors to be downloaded, or to stay on one client; those with b = 0, drawn from the seed; or only its own.

    `magnitudes`: whether DoRA's magnitudes, which are trained with b, are averaged or stay on the client; None for methods
    whose algebra is that of products b a or of other factors, and which DoRA thus does not fit.

    `no_weight_decay`: the reason why `train.weight_decay` must be 0, if it must.

    `weights` are the clients' default weights in the mean of the factors and of the head: numbers of examples, or uniform.

    `exact` is a short answer, optionally followed by a colon and the reason: whether the aggregate is the weighted mean of
    the clients' updates. `noise` is a remark on the noise of differential privacy; whether the method supports it follows
    from what leaves a client, see `report.guarantees`. `secure` is a remark on secure aggregation; whether it is possible
    follows from what the method collects, see `secure_sums`.

    `needs_labels`: whether it needs the labels of the clients' examples, and thus a task that has labels.

    `known_failures` maps the name of a law that does not hold to the reason; "law, mixed ranks" refers to mixed ranks only.
    """

    name: str
    make: Callable[..., AnyMethod]
    paper: str
    summary: str
    exact: str
    up: tuple[str, ...] = ("r * (out + in)",)
    down: tuple[str, ...] = ("r * (out + in)",)
    head: Head = "averaged"
    norms: bool = False
    no_weight_decay: str = ""
    weights: Weights = "examples"
    init: Literal["any", "drawn", "own"] = "drawn"
    magnitudes: Literal["averaged", "local"] | None = None
    personal: bool = False
    mixed_ranks: bool = False
    needs_labels: bool = False
    secure: str = ""
    noise: str = ""
    base_update: str = "0"
    first_upload: tuple[str, str] = ("0", "0")
    index_counts: tuple[str, str] | None = None
    index_counts_down: tuple[str, str] | None = None
    known_failures: Mapping[str, str] = field(default_factory=dict)
    fixed_settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def needs_individual_uploads(self) -> bool:
        """Whether the server needs each upload, and not only their mean, with the default settings."""
        return not self.make(**self.fixed_settings).collects_mean

    def secure_sums(self) -> str:
        """Whether the method works with secure aggregation, which reveals only sums of uploads to the server."""
        if not self.needs_individual_uploads and self.index_counts is None:
            return f"yes: {self.secure}" if self.secure else "yes"
        return f"no: {self.secure or 'the server needs individual uploads'}"

    def rejects_init(self, init: Init) -> str | None:
        """The reason why the method cannot start from `lora.init`; None if it can."""
        if self.init == "any" or init == "uniform":
            return None
        if self.init == "own":
            return "it has initial factors of its own"
        return "it starts from b = 0, or draws a on each machine; use uniform or gaussian" if init == "pissa" else None

    def settings(self) -> dict[str, Any]:
        """The user's settings, with their defaults."""
        return {f.name: f.default for f in fields(self.make) if f.name not in self.fixed_settings}  # type: ignore[arg-type]
