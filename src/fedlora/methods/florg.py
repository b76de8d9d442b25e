"""FLoRG: one trained factor, used twice; the server averages Gram matrices and rotates the result."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedlora.adapter import Adapter, AdapterSpec, Tensors, pack, pick, unpack
from fedlora.linalg import subspace
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Merged, Reply, Round, Upload
from fedlora.method import ClientRound, Local, Method, changes, fit
from fedlora.parts.tied import Tied
from fedlora.randomness import generator
from fedlora.ranges import PositiveFloat, PositiveInt, checked


@dataclass(frozen=True)
class Rows:
    """For each module, rows m with m^T m = sum_i w_i a_i^T a_i, fp64; no more than `short` after the next upload."""

    rows: Tensors
    weight: float


@dataclass(frozen=True)
@checked
class FLoRG(Method[Tensors, Tensors, Rows]):
    """The mean q of the clients' Gram matrices a^T a [short, short], reduced to a factor a [rank, short].

    short = min(out, in). The update is a^T a times a frozen random frame with orthonormal rows, [short, in], or, if out >
    in, a frame with orthonormal columns [out, short] times a^T a. With a frame on both sides, as published, the same
    updates can be learned: the frame of the shorter side is square, and rotates a. Frames come from the run's seed, and are
    never sent.

    The server's a is the factor of q, rotated to be near the previous a (Procrustes), and near the initial a in directions
    that the previous one lacks. The mean is exact, the reduction to the rank is not: the clients' a_i together have up to
    `rank` times the number of clients ranks.

    Not stated in the paper, and chosen here: `align`, `start`, `std`, and that `rank` is at most min(out, in). a contains
    the square root of alpha / rank. a^T a is positive semidefinite, so that a frame limits what can be learned; a = 0 is
    stationary, so `train.weight_decay` must be 0. Clients upload a; uploading a^T a would be larger, but a sum.

    Source: Meng et al. 2026, arXiv:2602.17095.
    """

    rank: PositiveInt = 8
    align: Literal["top", "published"] = "top"
    """How the rank is reduced: to the best approximation of the mean Gram matrix (top), or to the directions nearest to the
    previous factor (published)."""
    start: Literal["offset", "plain"] = "offset"
    """Whether the update of the initial factor is subtracted, so that training starts from the pretrained model (offset),
    or not (plain)."""
    std: PositiveFloat = 0.02
    """The standard deviation of the entries of the initial factor, which must not be zero."""
    frame: Literal["haar", "signed-permutation"] = "haar"
    """The frames: uniformly random orthonormal ones (haar), or random coordinates with random signs (signed-permutation),
    which are drawn faster."""

    def init_server(self, spec: AdapterSpec, seed: int) -> Tensors:
        """The common initial factor."""
        return {f"{name}.a": self._first(spec, name, seed) for name in spec.modules}

    def init_client(self, spec: AdapterSpec, client: ClientInfo, seed: int) -> Tensors:
        """Frames and offsets, the same on every client."""
        found: dict[str, Tensor] = {}
        for name, size in spec.modules.items():
            first = self._first(spec, name, seed)
            found[f"{name}.offset"] = first if self.start == "offset" else first[:0]
            found[f"{name}.frame"] = self._frame(*size, generator(seed, "florg frame", name)).to(spec.dtype)
        return found

    def view(self, state: Tensors, download: Tensors, client: ClientInfo) -> Adapter:
        """The downloaded factor beside the client's frame."""
        return _parts(state, download)

    def work(self, state: Tensors, download: Tensors, client: ClientInfo, rnd: Round) -> Local[tuple[Tensors, Upload]]:
        """Trains a and uploads it."""
        return state, Upload(pick(pack((yield from fit(self.view(state, download, client), "a"))), "a"))

    def collect(self, server: Tensors, collected: Rows | None, reply: Reply) -> Rows:
        """The weighted rows of all uploads, reduced by a QR decomposition, which keeps their Gram matrix."""
        rows, root = dict[str, Tensor](), reply.weight**0.5
        for key, a in reply.upload.values.items():
            own = root * a.double()
            rows[key] = own if collected is None else _reduced(torch.cat([collected.rows[key], own]))
        return Rows(rows, reply.weight + (collected.weight if collected else 0.0))

    def merge(self, server: Tensors, collected: Rows, rnd: Round) -> Merged[Tensors]:
        """The factor of the mean Gram matrix, near the previous one.

        Raises:
            ValueError: no reply has a positive weight.
        """
        if not collected.weight > 0:
            raise ValueError("cannot merge: no reply has a positive weight")
        root, merged = collected.weight**0.5, dict[str, Tensor]()
        for key, a in server.items():
            rank, short = a.shape
            first = _drawn(rank, short, rnd.seed, key.removesuffix(".a"))
            merged[key] = self._merged(a, collected.rows[key] / root, first).to(a)
        return Merged(merged)

    def update(self, known: ClientRound, upload: Upload) -> Mapping[str, LowRank]:
        """The change of the product with the uploaded factor."""
        both = (_parts(known.initial, tensors) for tensors in (upload.values, known.download))
        after, before = ({name: part.as_two_factors() for name, part in parts.items()} for parts in both)
        return changes(after, before)

    def _merged(self, previous: Tensor, rows: Tensor, first: Tensor) -> Tensor:
        """A factor a [rank, short] of rows^T rows, fp64, rotated to be near the previous one, and near the first one
        where that has no direction."""
        _, s, vt = torch.linalg.svd(rows, full_matrices=False)
        whole = s[:, None] * vt
        kept = whole[: len(previous)] if self.align == "top" else whole
        return subspace.aligned_rows(kept, previous, first, max(previous.shape) * torch.finfo(previous.dtype).eps)

    def _first(self, spec: AdapterSpec, name: str, seed: int) -> Tensor:
        short = min(spec.modules[name])
        rank = min(spec.rank(name, self.rank), short)
        return (math.sqrt(spec.scale(name, rank)) * self.std * _drawn(rank, short, seed, name)).to(spec.dtype)

    def _frame(self, out: int, in_: int, rng: torch.Generator) -> Tensor:
        """Orthonormal rows [out, in], or columns if out > in."""
        short, long = sorted((out, in_))
        if self.frame == "haar":
            columns = subspace.frame(long, short, rng)
        else:
            places = torch.randperm(long, generator=rng)[:short]
            signs = 2.0 * torch.randint(2, (short,), generator=rng) - 1
            columns = torch.zeros(long, short).index_put((places, torch.arange(short)), signs)
        return columns if out > in_ else columns.mT.contiguous()


def _drawn(rank: int, short: int, seed: int, name: str) -> Tensor:
    """A module's initial factor before it is scaled."""
    return torch.randn(rank, short, generator=generator(seed, "florg", name))


def _reduced(rows: Tensor) -> Tensor:
    """At most as many rows as columns, with the same Gram matrix."""
    return rows if len(rows) <= rows.shape[1] else torch.linalg.qr(rows, mode="r").R


def _parts(state: Tensors, download: Tensors) -> dict[str, Tied]:
    return unpack({**download, **state}, Tied)
