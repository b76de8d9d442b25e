"""FLASC: downloads only the largest weights, uploads only the largest changes; a server optimizer applies their mean."""

import fractions
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import floor
from typing import Annotated, Literal

import torch
from torch import Tensor

from fedlora.adapter import Adapter, AdapterSpec, Tensors, lora_init, pack, unpack
from fedlora.linalg.lowrank import LowRank
from fedlora.linalg.sparse import largest, pack_positions, unpack_positions
from fedlora.messages import ClientInfo, Mean, Merged, Round, Upload
from fedlora.method import ClientRound, Local, Method, fit
from fedlora.methods.scaled import scaled, unscaled
from fedlora.ranges import AtMost, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, checked

Sizes = Mapping[str, tuple[int, int, int]]
"""Module -> (out, rank, in)."""


@dataclass(frozen=True)
class Shapes:
    """Shapes of the vector's pieces, and each module's scale (see `AdapterSpec.scale`), as known to a client."""

    sizes: Sizes
    scales: Mapping[str, float]


_BETAS, _EPSILON = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class FlascState:
    """The server's state: all P entries, including those not sent, and the state of its optimizer.

    b is PEFT's `lora_B`, also in messages: the scale would affect the selection of entries and AdamW's steps.
    """

    adapter: Mapping[str, LowRank]
    static: Tensor | None = None
    """The fixed download mask [P] of all later rounds, if any."""
    steps: int = 0
    first: Tensor | None = None
    second: Tensor | None = None


@dataclass(frozen=True)
@checked
class FLASC(Method[FlascState, Shapes, Mean]):
    """PEFT's factors of all modules form one vector of P entries, of which the floor(density P) largest are sent.

    A client downloads the entries of largest magnitude; the others are zero. It trains all entries (with
    `train_sent_only`, only those sent), and uploads the entries of largest change. The server updates its dense vector
    with the mean change as negative gradient, with `optimizer` and `server_lr` (`sgd` with 1 is addition). The factors
    are averaged separately, hence inexactly. The head, if averaged, is sent densely.

    All clients train all ranks. A client of rank r_k below `rank` has less traffic: both densities are multiplied by
    r_k / rank. The paper's tiers are ranks rank / 4^e. The evaluated model is the one that is sent: the server's vector
    with its smaller entries set to zero.

    Clients have equal weight, as in the released code, unless `method.weights` is "examples". From round `static_from`
    on, counted from 0, the download mask is fixed. With 0, as in the released code, b is never sent, as it is zero in
    that round. The released AdamW also has a weight decay of 0.01, which shrinks all entries in each round; here the
    default of `server_decay` is 0. Not implemented: decaying densities, frozen a.

    Source: Kuo et al. 2024, arXiv:2406.05233, and its released code; the default densities are this package's choice.
    """

    rank: PositiveInt = 8
    density_down: Fraction = 0.25
    """The fraction of the entries that is sent to a client."""
    density_up: Fraction = 0.25
    """The fraction of the entries that a client uploads."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """The optimizer of the server's step."""
    server_lr: PositiveFloat = 1e-3
    """The learning rate of the server's step."""
    server_decay: NonNegativeFloat = 0.0
    """Weight decay of the server's step, with `adamw`."""
    static_from: Annotated[NonNegativeInt, AtMost("rounds", less=1)] | None = None
    """The round, counted from 0, whose download positions are used from then on. If omitted, each round has its own.

    Example: 1
    """
    train_sent_only: bool = False
    """Whether clients train only the entries that they were sent."""

    def init_server(self, spec: AdapterSpec, seed: int) -> FlascState:
        """Factors with zero update."""
        start = FlascState(lora_init(spec, self.rank, seed))
        return replace(start, static=self._largest(_flat(start.adapter))) if self.static_from == 0 else start

    def init_client(self, spec: AdapterSpec, client: ClientInfo, seed: int) -> Shapes:
        """The shapes of the factors, which the download does not contain; constant."""
        return Shapes(_sizes(spec, self.rank), spec.scales(self.rank))

    def send(self, server: FlascState, client: ClientInfo, rnd: Round) -> Tensors:
        """The entries of largest magnitude and their positions, or those of a static mask, up to the client's density."""
        vector = _flat(server.adapter)
        sizes = vector.abs() if server.static is None else vector.abs().where(server.static, -1.0)
        chosen = largest(sizes, self._count(self.density_down, client.rank, len(vector)))
        return {"values": vector[chosen], "positions": pack_positions(chosen)}

    def view(self, state: Shapes, download: Tensors, client: ClientInfo) -> Adapter:
        """The downloaded entries, zero elsewhere."""
        before, _ = self._received(state.sizes, download, client)
        return scaled(unpack(_shaped(before, state.sizes), LowRank), state.scales)

    def work(self, state: Shapes, download: Tensors, client: ClientInfo, rnd: Round) -> Local[tuple[Shapes, Upload]]:
        """Trains all entries, and uploads the changes of largest magnitude."""
        before, sent = self._received(state.sizes, download, client)
        mask = _shaped(sent, state.sizes) if self.train_sent_only else None
        trained = unpack(pack((yield from fit(self.view(state, download, client), mask=mask))), LowRank)
        change = _flat(unscaled({name: trained[name] for name in state.sizes}, state.scales)) - before
        chosen = largest(change.abs(), self._count(self.density_up, client.rank, len(change)))
        return state, Upload({"changes": change[chosen]}, {"positions": pack_positions(chosen)})

    def expected_upload(self, known: ClientRound, upload: Upload, template: Upload) -> Upload:
        """The template, which does not depend on the chosen positions.

        Raises:
            ValueError: the positions are invalid, or not as many as the client may send.
        """
        self._positions(known, upload)
        return template

    def expand(self, known: ClientRound, upload: Upload) -> Tensors:
        """The changes at their positions [P], zeros elsewhere."""
        chosen, changes = self._positions(known, upload), upload.values["changes"]
        return {"changes": changes.new_zeros(len(chosen)).masked_scatter(chosen, changes)}

    def merge(self, server: FlascState, collected: Mean, rnd: Round) -> Merged[FlascState]:
        """The vector after the server's step along the mean change."""
        after = self._step(server, _flat(server.adapter), collected.tensors()["changes"])
        if self.static_from == rnd.index + 1:
            after = replace(after, static=self._largest(_flat(after.adapter)))
        return Merged(after)

    def update(self, known: ClientRound, upload: Upload) -> None:
        """None: the server steps along the changes instead of adding them."""

    def _positions(self, known: ClientRound, upload: Upload) -> Tensor:
        """The mask of the uploaded entries [P]."""
        total = _total(_sizes(known.spec, self.rank))
        count = self._count(self.density_up, known.client.rank, total)
        return unpack_positions(upload.choices["positions"], count, total)

    def _step(self, server: FlascState, vector: Tensor, change: Tensor) -> FlascState:
        """A step of the server's optimizer with minus the mean change as gradient; AdamW in torch's order of operations."""
        vector = vector * (1 - self.server_lr * self.server_decay)
        if self.optimizer == "sgd":
            return replace(server, adapter=_adapter(vector + self.server_lr * change, server.adapter))
        steps, zero = server.steps + 1, torch.zeros_like(vector)
        first = torch.lerp(zero if server.first is None else server.first, -change, 1 - _BETAS[0])
        second = (zero if server.second is None else server.second) * _BETAS[1]
        second = second.addcmul(change, change, value=1 - _BETAS[1])
        scale = (second.sqrt() / (1 - _BETAS[1] ** steps) ** 0.5) + _EPSILON
        vector = vector.addcdiv(first, scale, value=-self.server_lr / (1 - _BETAS[0] ** steps))
        return FlascState(_adapter(vector, server.adapter), server.static, steps, first, second)

    def _received(self, state: Sizes, download: Tensors, client: ClientInfo) -> tuple[Tensor, Tensor]:
        """The downloaded vector [P], and the mask of its sent entries [P]."""
        total = _total(state)
        sent = unpack_positions(download["positions"], self._count(self.density_down, client.rank, total), total)
        return torch.zeros(total, dtype=download["values"].dtype).masked_scatter(sent, download["values"]), sent

    def _largest(self, vector: Tensor) -> Tensor:
        return largest(vector.abs(), self._count(self.density_down, self.rank, len(vector)))

    def _count(self, density: float, rank: int, total: int) -> int:
        """floor(density total rank / self.rank), computed in decimal, so that a density of 0.29 of 100 entries gives 29."""
        return floor(fractions.Fraction(str(density)) * fractions.Fraction(rank, self.rank) * total)


def _sizes(spec: AdapterSpec, rank: int) -> dict[str, tuple[int, int, int]]:
    return {name: (out, spec.rank(name, rank), in_) for name, (out, in_) in spec.modules.items()}


def _total(sizes: Sizes) -> int:
    return sum(rank * (out + in_) for out, rank, in_ in sizes.values())


def _flat(adapter: Adapter) -> Tensor:
    """All entries of the factors [P]: b, then a, module by module."""
    return torch.cat([x.flatten() for x in pack(adapter).values()])


def _shaped(vector: Tensor, sizes: Sizes) -> dict[str, Tensor]:
    """The inverse of `_flat`, packed."""
    shapes = {f"{n}.{f}": shape for n, (o, r, i) in sizes.items() for f, shape in (("b", (o, r)), ("a", (r, i)))}
    pieces = torch.split(vector, [rows * columns for rows, columns in shapes.values()])
    return {key: piece.view(shape) for piece, (key, shape) in zip(pieces, shapes.items(), strict=True)}


def _adapter(vector: Tensor, template: Mapping[str, LowRank]) -> dict[str, LowRank]:
    sizes = {name: (part.b.shape[0], part.rank, part.a.shape[1]) for name, part in template.items()}
    return unpack(_shaped(vector, sizes), LowRank)
