"""The section `privacy` of an experiment."""

from typing import Annotated, Literal

from pydantic import model_validator

from fedlora.config.sections import Section
from fedlora.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, Range

Clip = Annotated[float, Range(ge=1e-6)]
"""A clip. With a smaller one, gradients and noise would be lost in rounding, and clipped norms would not be within it."""


class Privacy(Section):
    """Differential privacy (docs/privacy.md)."""

    unit: Literal["none", "record", "client"] = "none"
    """What the guarantee protects. none: nothing. record: each example of a client, also from the server, by DP-SGD on the
    client. client: all examples of a client together, from those who see the trained model, by noise that the server adds
    to the sum of the clipped uploads."""
    clip: Clip = 1.0
    """The largest L2 norm, over all trained tensors together, of an example's gradient (record) or of the change in a
    client's upload (client); larger ones are scaled down to it. It should be proportional to the scale of the factors."""
    noise_multiplier: NonNegativeFloat | None = None
    """The standard deviation of the noise, in units of `privacy.clip`. Needed unless `privacy.epsilon` is given; 0 clips
    only, without a guarantee.

    Example: 1.0
    """
    epsilon: PositiveFloat | None = None
    """The largest epsilon of the whole run, from which the noise is computed.

    Example: 8.0
    """
    delta: Annotated[float, Range(gt=0, lt=1)] | None = None
    """The delta of the guarantee, at most 1 / (10 n) for n protected units: the examples of the largest client (record) or
    the clients (client).

    Example: 1e-5
    """
    participations: PositiveInt | None = None
    """For records: the largest number of rounds in which a client takes part; beyond it, the client sits out. If omitted,
    all rounds.

    Example: 20
    """
    public_counts: bool = False
    """For records: whether the clients' numbers of examples are public, and may be sent and weigh their uploads."""
    largest_cohort: PositiveInt | None = None
    """For clients: the largest number of clients in a round, at least the expected one, `sampling.fraction` of all clients.
    Of more drawn clients, so many take part, chosen at random. If omitted, all drawn clients. Smaller limits cost more
    epsilon.

    Example: 150
    """
    clip_quantile: Annotated[float, Range(gt=0, lt=1)] | None = None
    """For clients: adapts the clip from round to round, so that it approaches this quantile of the norms (Andrew et al.
    2021, arXiv:1905.03871). If omitted, the clip is fixed.

    Example: 0.5
    """
    clip_rate: PositiveFloat = 0.2
    """The rate of the adaptation of the clip."""

    @property
    def hides_counts(self) -> bool:
        """Whether clients do not send their numbers of examples; then all have the same weight."""
        return self.unit != "none" and not self.public_counts

    @model_validator(mode="after")
    def _complete(self) -> "Privacy":
        fields = type(self).model_fields
        changed = {key for key in fields if getattr(self, key) != fields[key].default}
        only = {"record": {"participations", "public_counts"}, "client": {"clip_quantile", "clip_rate", "largest_cohort"}}
        for unit, keys in only.items():
            if unit != self.unit and (wrong := sorted(changed & keys)):
                raise ValueError(f"privacy.{wrong[0]} needs privacy.unit = {unit!r}")
        if self.unit == "none":
            if changed:
                raise ValueError(f"privacy.{min(changed)} needs privacy.unit = 'record' or 'client'")
            return self
        if (self.noise_multiplier is None) == (self.epsilon is None):
            raise ValueError("privacy needs either privacy.noise_multiplier or privacy.epsilon")
        if self.delta is None:
            raise ValueError("privacy needs privacy.delta, such as 1e-5")
        if "clip_rate" in changed and self.clip_quantile is None:
            raise ValueError("privacy.clip_rate needs privacy.clip_quantile")
        return self
