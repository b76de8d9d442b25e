"""FSLoRA: in each round a client trains a random subset of each module's ranks, scaled to be unbiased."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Int64
from torch import Tensor

from fedlora.adapter import AdapterSpec, Tensors, pack, unpack
from fedlora.linalg.lowrank import LowRank
from fedlora.messages import ClientInfo, Mean, Merged, Round, Upload
from fedlora.method import ClientRound, Local, Method, changes, fit
from fedlora.methods.flexlora import Sliced
from fedlora.ranges import PositiveInt, checked

_CHANGE = "change/"  # prefix of a name: the tensor is the factor's change, not its new value


@dataclass(frozen=True)
@checked
class FSLoRA(Method[Sliced, Mapping[str, int], Mean]):
    """Client k trains b s_k a, with s_k = rank / r_k on a random r_k-subset of the diagonal, else 0: E[s_k] = 1.

    The subset is drawn for each round, client and module from the run's seed; both sides derive it, so it costs no
    traffic. The client trains the slice ((rank / r_k) b[:, subset], a[subset]) as an adapter of rank r_k. With the
    scale alpha / rank this is exactly SGD, or AdamW, on the columns of b and the rows of a in the paper's model b s_k
    a: the slice has the same `lora_B` as b, since (alpha / rank) (rank / r_k) = alpha / r_k. With rsLoRA the output is
    the same, but the slice's `lora_B` is larger by (rank / r_k)^1/2 and changes too slowly. `scaling` corrects this:
    "rslora-sgd" multiplies b's learning rate by rank / r_k, "rslora-adamw" by its square root, which is exact except
    for weight decay and epsilon. All ranks are trained in a module whose rank is fixed for all clients; the correction
    is not intended for it.

    The server adds the mean change of the factors over all participants, with zeros for ranks that a client did not
    train; the factor rank / r_k compensates for these. Clients have equal weight, as in the released code, unless
    `method.weights` is "examples".

    With `download` "all", as in the paper, a client downloads the whole adapter, and is evaluated with it. With "slice"
    it downloads only the round's slice, which suffices for training, and is evaluated with this random slice.

    Source: Fang et al. 2025, arXiv:2501.19389, Algorithm 1; the equations are reconstructed from its code and reviews.
    In the released script, a comparison of parameter names fails, so that no subset is ever applied, and the server
    uses AdamW.
    """

    rank: PositiveInt = 8
    download: Literal["all", "slice"] = "all"
    """What clients download: all ranks (all), or only those they train (slice)."""
    scaling: Literal["plain", "rslora-sgd", "rslora-adamw"] = "plain"
    """Correction of b's learning rate: plain, or rslora-sgd and rslora-adamw for `lora.rslora` with that optimizer."""

    def init_server(self, spec: AdapterSpec, seed: int) -> Sliced:
        """Factors with zero update at the largest rank."""
        return Sliced.init(spec, self.rank, seed)

    def init_client(self, spec: AdapterSpec, client: ClientInfo, seed: int) -> Mapping[str, int]:
        """The number of ranks of each module that the client trains; constant."""
        return {name: spec.rank(name, client.rank) for name in spec.modules}

    def send(self, server: Sliced, client: ClientInfo, rnd: Round) -> Tensors:
        """The adapter, or the round's slice of it."""
        if self.download == "all":
            return pack(server.adapter)
        kept = {name: server.fixed.get(name, client.rank) for name in server.adapter}
        return pack(sliced(server.adapter, kept, client, rnd))

    def work(
        self, state: Mapping[str, int], download: Tensors, client: ClientInfo, rnd: Round
    ) -> Local[tuple[Mapping[str, int], Upload]]:
        """Trains the slice, and uploads its change."""
        start = self._start(state, download, client, rnd)
        power = {"plain": 0.0, "rslora-sgd": 1.0, "rslora-adamw": 0.5}[self.scaling]
        trained = pack((yield from fit(start, rates={"b": (self.rank / client.rank) ** power})))
        before = pack(start)
        return state, Upload({_CHANGE + key: x - before[key] for key, x in trained.items()})

    def expand(self, known: ClientRound, upload: Upload) -> Tensors:
        """The changes of the slice as changes of the adapter: b's unscaled, zero outside the subset."""
        found: dict[str, LowRank] = {}
        for name, part in _change(upload).items():
            whole = known.spec.rank(name, self.rank)
            chosen = subset(name, whole, part.rank, known.client, known.round)
            b, a = part.b.new_zeros(part.b.shape[0], whole), part.a.new_zeros(whole, part.a.shape[1])
            b[:, chosen], a[chosen] = part.b * (part.rank / whole), part.a
            found[name] = LowRank(b=b, a=a)
        return pack(found)

    def merge(self, server: Sliced, collected: Mean, rnd: Round) -> Merged[Sliced]:
        """The adapter plus the mean change."""
        moves = unpack(collected.tensors(), LowRank)
        adapter = {n: LowRank(b=x.b + moves[n].b, a=x.a + moves[n].a) for n, x in server.adapter.items()}
        return Merged(replace(server, adapter=adapter))

    def update(self, known: ClientRound, upload: Upload) -> Mapping[str, LowRank]:
        """The change of the slice's product."""
        start = self._start(known.initial, known.download, known.client, known.round)
        after = {n: LowRank(b=start[n].b + x.b, a=start[n].a + x.a) for n, x in _change(upload).items()}
        return changes(after, start)

    def _start(self, state: Mapping[str, int], download: Tensors, client: ClientInfo, rnd: Round) -> dict[str, LowRank]:
        """The client's slice of the round."""
        received = unpack(download, LowRank)
        return sliced(received, state, client, rnd) if self.download == "all" else received


def subset(module: str, rank: int, kept: int, client: ClientInfo, rnd: Round) -> Int64[Tensor, "kept"]:
    """The ranks that the client trains in this round, in ascending order; all subsets of this size are equally likely."""
    return torch.randperm(rank, generator=rnd.rng(f"sketch {module}", client.id))[:kept].sort().values


def sliced(adapter: Mapping[str, LowRank], kept: Mapping[str, int], client: ClientInfo, rnd: Round) -> dict[str, LowRank]:
    """b s a as factors of rank `kept`: columns of b, scaled by rank / kept, and the same rows of a."""
    parts: dict[str, LowRank] = {}
    for name, part in adapter.items():
        chosen = subset(name, part.rank, kept[name], client, rnd)
        parts[name] = LowRank(b=part.b[:, chosen] * (part.rank / kept[name]), a=part.a[chosen])
    return parts


def _change(upload: Upload) -> dict[str, LowRank]:
    return unpack({key.removeprefix(_CHANGE): x for key, x in upload.values.items()}, LowRank)
