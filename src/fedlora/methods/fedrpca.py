"""FedRPCA: averages the common low-rank part of the clients' changes, and amplifies the mean of the sparse part."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from fedlora.adapter import AdapterSpec, Tensors, pack, unpack
from fedlora.linalg.fit import truncate
from fedlora.linalg.lowrank import LowRank
from fedlora.linalg.mean_update import Updates, alike, batch, unbatch
from fedlora.linalg.robust_pca import robust_pca
from fedlora.messages import ClientInfo, Merged, Reply, Round
from fedlora.method import Method
from fedlora.methods.scaled import Scaled, scaled, unscaled
from fedlora.randomness import derive
from fedlora.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, Range, UnitInterval, checked


@dataclass(frozen=True)
@checked
class FedRPCA(Method[Scaled, None, tuple[tuple[float, Updates], ...]]):
    """Robust PCA splits the clients' changes since the download, as columns x_k, into low-rank l_k plus sparse s_k.

    The server's change is mean(l_k) + beta mean(s_k), for each module; both are weighted means. `beta` 1 is FedIT. If
    `beta` is None, it is |mean(x_k)| / |mean(s_k)|, at most `beta_max`.

    `columns` defines the columns: b and a separately ("factors"), b and a concatenated ("both"), or the product b a
    ("product"), whose new value is then truncated to the rank. b is PEFT's `lora_B`, without the scale alpha / rank.
    `sparsity` is the weight of the 1-norm (lambda); None is 1/sqrt(max(n, K)) for K columns of n entries.

    With few clients, or dense noise, robust PCA classifies nearly everything as sparse, and would amplify all of it.
    Hence beta is 1 with fewer than `min_clients`, or if a larger fraction than `max_density` of the sparse entries is
    not zero. With a few clients more, identical clients are still not reproduced exactly, because the largest entries
    of their common change count as sparse; the excess decreases with the number of clients. All uploads are in memory
    at once, since the decomposition needs all columns.

    Source: Jhunjhunwala et al. 2025, arXiv:2506.01194; no code is released, and the abstract does not specify columns,
    beta or sparsity.
    """

    rank: PositiveInt = 8
    beta: NonNegativeFloat | None = None
    """The factor on the sparse part. If omitted, it is set for each module from the share of the sparse part.

    Example: 2.0
    """
    beta_max: Annotated[float, Range(ge=1)] = 3.0
    """The largest factor on the sparse part if `beta` is omitted."""
    columns: Literal["factors", "both", "product"] = "factors"
    """What is split: each factor separately (factors), both together (both), or their product (product)."""
    sparsity: PositiveFloat | None = None
    """Weight of the sparse part in robust PCA: the larger, the less is sparse. If omitted, 1 / sqrt(max(n, K)) for K
    clients and n entries.

    Example: 0.05
    """
    min_clients: PositiveInt = 4
    """With fewer clients in a round, plain averaging."""
    max_density: UnitInterval = 0.5
    """If a larger fraction of the sparse part is not zero, plain averaging."""
    tolerance: PositiveFloat = 1e-7
    """The relative residual at which robust PCA has converged."""
    steps: PositiveInt = 1000
    """The largest number of iterations of robust PCA."""

    def init_server(self, spec: AdapterSpec, seed: int) -> Scaled:
        """Factors with zero update."""
        return Scaled.init(spec, self.rank, seed)

    def send(self, server: Scaled, client: ClientInfo, rnd: Round) -> Tensors:
        """The factors."""
        return pack(server.adapter)

    def collect(
        self, server: Scaled, collected: tuple[tuple[float, Updates], ...] | None, reply: Reply
    ) -> tuple[tuple[float, Updates], ...]:
        """All uploads of positive weight, with PEFT's b, and their weights."""
        trained = unscaled(unpack(reply.upload.values, LowRank), server.scales)
        return (*(collected or ()), *(((reply.weight, trained),) if reply.weight > 0 else ()))

    def merge(self, server: Scaled, collected: tuple[tuple[float, Updates], ...], rnd: Round) -> Merged[Scaled]:
        """The factors after the server's change; modules of equal shape are decomposed in one batch."""
        start, merged = unscaled(server.adapter, server.scales), dict[str, LowRank]()
        shares = _shares([weight for weight, _ in collected])
        for names in alike(start):
            before, after = batch(start, names), [batch(update, names) for _, update in collected]
            found = self._moved(before, after, shares, derive(rnd.seed, "truncate", rnd.index))
            merged |= unbatch(found, names, before.b.dtype)
        return Merged(replace(server, adapter=scaled({name: merged[name] for name in start}, server.scales)))

    def _moved(self, before: LowRank, after: Sequence[LowRank], shares: Tensor, seed: int) -> LowRank:
        """The new factors [module, ...] of modules of equal shape."""
        if self.columns == "product":
            old = before.product().double()
            moved = old + self._step([(part.product() - old).flatten(1) for part in after], shares).reshape(old.shape)
            return truncate(moved.to(before.b.dtype), before.rank, seed=seed)
        steps_b = [(part.b.double() - before.b).flatten(1) for part in after]
        steps_a = [(part.a.double() - before.a).flatten(1) for part in after]
        if self.columns == "both":
            step = self._step([torch.cat(pair, 1) for pair in zip(steps_b, steps_a, strict=True)], shares)
            step_b, step_a = step.tensor_split([steps_b[0].shape[1]], dim=1)
        else:
            step_b, step_a = self._step(steps_b, shares), self._step(steps_a, shares)
        return LowRank(b=before.b + step_b.reshape(before.b.shape), a=before.a + step_a.reshape(before.a.shape))

    def _step(self, columns: Sequence[Tensor], shares: Tensor) -> Tensor:
        """The server's change [module, n] from the clients' [module, n]."""
        x = torch.stack(list(columns), -1)  # [module, n, K]
        mean = x @ shares
        if len(columns) < self.min_clients:
            return mean
        sparse = robust_pca(x, self.sparsity, self.tolerance, self.steps).sparse
        extra = sparse @ shares
        beta = self._beta(extra, mean).where((sparse != 0).double().mean((1, 2)) <= self.max_density, 1)
        return mean + (beta - 1)[:, None] * extra

    def _beta(self, extra: Tensor, mean: Tensor) -> Tensor:
        """beta [module], at most `beta_max`, also if the sparse part is zero."""
        size = torch.linalg.vector_norm(extra, dim=1)
        if self.beta is not None:
            return torch.full_like(size, self.beta)
        ratio: Tensor = torch.linalg.vector_norm(mean, dim=1) / size
        return ratio.nan_to_num(nan=1.0, posinf=self.beta_max).clamp(1, self.beta_max)


def _shares(weights: Sequence[float]) -> Tensor:
    """The normalized weights, in fp64.

    Raises:
        ValueError: there are none.
    """
    if not weights:
        raise ValueError("cannot merge: no reply has a positive weight")
    found = torch.tensor(weights, dtype=torch.float64)
    return found / found.sum()
