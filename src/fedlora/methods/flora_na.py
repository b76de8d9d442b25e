"""FLoRA-NA: combines the b and the a with coefficients that make the product approximate the mean of the products."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fedlora.adapter import AdapterSpec, Tensors, pack, unpack
from fedlora.linalg.als import Coefficients, Layer, affine, alternate, batch_size, combined, descend, linear
from fedlora.linalg.combine import leading, widen
from fedlora.linalg.lowrank import LowRank
from fedlora.linalg.mean_update import Updates, alike, batch, unbatch
from fedlora.linalg.weighted_terms import Terms
from fedlora.messages import ClientInfo, Merged, Reply, Round
from fedlora.method import Method
from fedlora.methods.flexlora import Sliced
from fedlora.ranges import PositiveFloat, PositiveInt, checked


@dataclass(frozen=True)
@checked
class FLoRANA(Method[Sliced, None, tuple[tuple[float, Updates], ...]]):
    """The adapter becomes (sum_k p_k b_k, sum_k q_k a_k), p and q minimizing |product - sum_k w_k b_k a_k| (Frobenius).

    Law: the error is at most that of averaged factors (p = q = w), the initial coefficients, and at least that of the
    best fit of the same rank. The merge is exact if all clients have a common factor, up to multiples of it.

    `form` "linear" is the paper's; "affine", as in the development code, combines the factors' changes since the start
    of the round. p and q are fitted for each "layer" or for the whole "model", according to `scope`; the paper does not
    specify it, and the code has "model". `solver` "als" is alternating least squares; "adamw" is the published solver,
    with `steps` steps at learning rate `rate`. Here, target and estimate have the same weights, and the distance is
    minimized; the code has uniform weights in the target, and later versions divide the distance by its smallest entry.

    Unequal ranks, which no paper covers, are zero-padded: the law above holds at the server's rank. A client of smaller
    rank downloads the leading ranks, without a separate fit. Ranks that no client of a round has are excluded from the
    fit, and restart from b = 0. The solver needs all uploads at once: its memory grows with the clients.

    Source: Nguyen et al. 2025, arXiv:2509.26399.
    """

    rank: PositiveInt = 8
    form: Literal["linear", "affine"] = "linear"
    """What is combined: the factors (linear), or their changes since the start of the round (affine)."""
    scope: Literal["layer", "model"] = "layer"
    """Whether coefficients are fitted for each layer or for the whole model."""
    solver: Literal["als", "adamw"] = "als"
    """The solver: alternating least squares (als), or gradient steps (adamw)."""
    steps: PositiveInt = 200
    """The number of steps of `adamw`."""
    rate: PositiveFloat = 1e-2
    """The learning rate of `adamw`."""

    def init_server(self, spec: AdapterSpec, seed: int) -> Sliced:
        """Factors with zero update at the largest rank."""
        return Sliced.init(spec, self.rank, seed)

    def send(self, server: Sliced, client: ClientInfo, rnd: Round) -> Tensors:
        """The leading part at the client's rank."""
        return pack(server.leading(client.rank))

    def collect(
        self, server: Sliced, collected: tuple[tuple[float, Updates], ...] | None, reply: Reply
    ) -> tuple[tuple[float, Updates], ...]:
        """All uploads of positive weight, and their weights."""
        one = ((reply.weight, unpack(reply.upload.values, LowRank)),) if reply.weight > 0 else ()
        return (*(collected or ()), *one)

    def merge(self, server: Sliced, collected: tuple[tuple[float, Updates], ...], rnd: Round) -> Merged[Sliced]:
        """The clients' factors, combined with the best-fitting coefficients."""
        groups = [group for names in alike(server.adapter) for group in _groups(names, collected, server.adapter)]
        adapter: dict[str, LowRank] = {}
        for group, fitted in zip(groups, self._fitted(groups), strict=True):
            rank, rng = server.adapter[group.names[0]].rank, rnd.rng(f"flora-na {group.names[0]}")
            adapter |= unbatch(widen(fitted, rank, rng), group.names, group.origin.b.dtype)
        return Merged(replace(server, adapter={name: adapter[name] for name in server.adapter}))

    def _fitted(self, groups: Sequence["_Group"]) -> Iterator[LowRank]:
        """The combined b [module, out, rank] and a [module, rank, in] of each group."""
        layers = map(self._layer, groups)
        if self.scope == "layer":
            yield from (combined(layer, self._solve([layer], shared=False)) for layer in layers)
        else:
            one = self._solve(together := list(layers), shared=True)
            yield from (combined(layer, one) for layer in together)

    def _layer(self, group: "_Group") -> Layer:
        return linear(group.terms) if self.form == "linear" else affine(group.terms, group.origin)

    def _solve(self, layers: Sequence[Layer], shared: bool) -> Coefficients:
        if self.solver == "als":
            return alternate(layers, shared)
        return descend(layers, shared, self.steps, self.rate)


@dataclass(frozen=True)
class _Group:
    """Modules of one shape: the clients' factors and the server's, at the largest rank that a client has."""

    names: Sequence[str]
    terms: Terms
    origin: LowRank


def _groups(names: Sequence[str], uploads: Sequence[tuple[float, Updates]], server: Updates) -> Iterator[_Group]:
    """Groups of modules of one shape that are solved together."""
    rank = max(update[name].rank for _, update in uploads for name in names)
    out, in_ = server[names[0]].b.shape[-2], server[names[0]].a.shape[-1]
    size = batch_size(len(uploads), rank, out + in_)
    for some in (names[i : i + size] for i in range(0, len(names), size)):
        terms = [(weight, batch(update, some, rank)) for weight, update in uploads]
        yield _Group(some, terms, leading(batch(server, some), rank))
