"""LoRA-A2: trains b and a in alternate rounds; each client trains only the ranks that change most on its data."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.linalg import vector_norm

from fedlora.adapter import Adapter, AdapterSpec, Tensors, low_rank, pack, pick, unpack
from fedlora.linalg.lowrank import LowRank
from fedlora.linalg.sparse import largest, pack_positions, unpack_positions
from fedlora.messages import ClientInfo, Mean, Merged, Round, Upload
from fedlora.method import ClientRound, Local, Method, changes, fit
from fedlora.methods.flexlora import Sliced
from fedlora.methods.rank_scores import RankScores, mask_of
from fedlora.ranges import AtMost, PositiveFloat, PositiveInt, checked

Side = Literal["b", "a"]
_SHARED = "shared ranks"  # in a download: positions, the most important first


@dataclass(frozen=True)
@checked
class LoRAA2(Method[Sliced | RankScores, Mapping[str, int], Mean]):
    """Client k trains and uploads r_k ranks per module on average, those of the whole model that change most.

    b is trained in even rounds, counted from 0, and a in odd ones: training a first would have no effect, as b = 0. The
    other factor is common to all clients, hence the merge is exact. A client first trains all ranks for `probe_epochs`,
    and scores rank i of a module by the norm of the change of its product: |db_i| |a_i| or |b_i| |da_i|. Then it
    restarts with the r_k N highest scores over all N modules; of equal scores, those of earlier modules are preferred.
    It uploads the changes and positions of these ranks. A client with r_k = `rank` skips the probe: this is RoLoRA.

    The budget counts ranks, not floats: ranks of wide modules need more traffic, and scores are not normalized by size.
    `b_rate` is the ratio of the learning rates of b and a, as in LoRA+. With Adam, one epoch changes all columns of b
    by similar amounts, so that early choices depend on the rows of a. A head that is not frozen is also trained in the
    probe.

    The paper does not specify the probe's learning rate (here that of the training), the rank in the scale alpha / r
    (here `rank`), and the rank in its main table (16 is consistent with the traffic it reports). It divides by the
    number of examples of all clients; here, by that of the participants. The choice of ranks depends on a client's
    data, and noise on the uploaded values does not cover it. With `upload` "all", the changes of all ranks are uploaded,
    zero where a rank was not chosen: noise or masks on them then cover the choice, at the traffic of RoLoRA.

    With `shared_rank`, which is not in the paper, the server chooses the ranks of a round, for all clients, from what it
    has merged before: if that has noise, the choice needs none of its own, and noise, masks and traffic are those of the
    chosen ranks only. There is no probe. A client with a smaller rank trains the most important ones of them. First come
    ranks that were never changed, in order; then those whose merged change, when they were last trained, was largest:
    the root mean square of db_i times |a_i|, or of da_i times |b_i|. With norms, as in a client's own choice, strong
    noise would always choose the widest modules, since each entry has the same noise.

    Source: Koo et al. 2025, arXiv:2410.22815, Algorithms 1 and 2, also where the text has the rounds reversed.
    """

    rank: PositiveInt = 16
    probe_epochs: PositiveInt = 1
    """The number of epochs after which a client chooses its ranks."""
    b_rate: PositiveFloat = 5.0
    """The learning rate of b relative to that of a."""
    upload: Literal["chosen", "all"] = "chosen"
    """The changes that a client uploads: those of its ranks, with their positions (chosen), or those of all ranks, with
    zeros (all)."""
    shared_rank: Annotated[PositiveInt, AtMost("rank")] | None = None
    """The number of ranks for each module, on average, that the server chooses for all clients of a round, by the changes
    that it has merged. If omitted, each client chooses its own.

    Example: 2
    """

    def __post_init__(self) -> None:
        """Checks that `upload` has its default with `shared_rank`.

        Raises:
            ValueError: it has not.
        """
        if self.shared_rank is not None and self.upload != "chosen":
            raise ValueError(f"upload = {self.upload!r}: with shared_rank, all clients upload the same ranks; remove it")

    def init_server(self, spec: AdapterSpec, seed: int) -> Sliced | RankScores:
        """Factors with zero update."""
        return (Sliced if self.shared_rank is None else RankScores).init(spec, self.rank, seed)

    def init_client(self, spec: AdapterSpec, client: ClientInfo, seed: int) -> Mapping[str, int]:
        """The modules in order, and the number of ranks that each adds to the budget; constant."""
        return _budget(spec, client)

    def send(self, server: Sliced | RankScores, client: ClientInfo, rnd: Round) -> Tensors:
        """All ranks of both factors, since a client may have missed rounds, and the server's choice if it makes one."""
        shared = {_SHARED: self._shared(server, rnd)} if isinstance(server, RankScores) else {}
        return {**pack(server.adapter), **shared}

    def view(self, state: Mapping[str, int], download: Tensors, client: ClientInfo) -> Adapter:
        """The downloaded adapter."""
        return _factors(download)

    def work(
        self, state: Mapping[str, int], download: Tensors, client: ClientInfo, rnd: Round
    ) -> Local[tuple[Mapping[str, int], Upload]]:
        """Probes and selects ranks, unless the server has; trains them from the downloaded adapter, uploads the changes."""
        received = _factors(download)
        start, side, rates = {name: received[name] for name in state}, _side(rnd), {"b": self.b_rate}
        ranks, budget = {name: part.rank for name, part in start.items()}, sum(state.values())
        total = sum(ranks.values())
        keep = common = torch.ones(total, dtype=torch.bool)
        if self.shared_rank is not None:
            keep, common = mask_of(download[_SHARED][:budget], total), mask_of(download[_SHARED], total)
        elif budget < total:
            after = low_rank((yield from fit(start, side, epochs=self.probe_epochs, rates=rates, role="probe")))
            keep = largest(torch.cat([score(part, after[name], side) for name, part in start.items()]), budget)
        chosen = _by_module(keep, ranks)
        mask = {f"{name}.{side}": own[None] if side == "b" else own[:, None] for name, own in chosen.items()}
        trained = low_rank((yield from fit(start, side, mask=mask, rates=rates)))
        moves = {name: _rows(trained[name], side) - _rows(start[name], side) for name in chosen}
        chooses = self.shared_rank is None and self.upload == "chosen"
        sent = _by_module(keep if chooses else common, ranks)
        changed = torch.cat([moves[name][own].flatten() for name, own in sent.items()])
        return state, Upload({"changes": changed}, {"positions": pack_positions(keep)} if chooses else {})

    def expected_upload(self, known: ClientRound, upload: Upload, template: Upload) -> Upload:
        """As many changes as the chosen ranks have entries.

        Raises:
            ValueError: the client has not chosen exactly its number of ranks.
        """
        sizes = [out if _side(known.round) == "b" else in_ for out, in_ in known.spec.modules.values()]
        chosen = self._chosen(known, upload).values()
        count = sum(size * int(own.sum()) for size, own in zip(sizes, chosen, strict=True))
        return replace(template, values={"changes": template.values["changes"].new_empty(count)})

    def expand(self, known: ClientRound, upload: Upload) -> Tensors:
        """The changes of this round's factor at their positions, zeros elsewhere; if all clients have the same, these."""
        return upload.values if self.shared_rank is not None else self._moves(known, upload)

    def merge(self, server: Sliced | RankScores, collected: Mean, rnd: Round) -> Merged[Sliced | RankScores]:
        """This round's factor plus the weighted mean of the changes, zero where a client trained nothing."""
        mean, side, before = collected.tensors(), _side(rnd), server.adapter
        if not isinstance(server, RankScores):
            return Merged(replace(server, adapter=_moved(before, mean)))
        ranks = {name: part.rank for name, part in before.items()}
        chosen = mask_of(self._shared(server, rnd), sum(ranks.values()))
        after = _moved(before, _spread(mean["changes"], _by_module(chosen, ranks), _widths(before, side), side))
        scores = [score(part, after[name], side) / _widths(before, side)[name] ** 0.5 for name, part in before.items()]
        return Merged(server.changed(after, side, torch.cat(scores)))

    def update(self, known: ClientRound, upload: Upload) -> Mapping[str, LowRank]:
        """The changes of one factor, times the other."""
        received = _factors(known.download)
        return changes(_moved(received, self._moves(known, upload)), received)

    def _moves(self, known: ClientRound, upload: Upload) -> Tensors:
        side, sizes = _side(known.round), known.spec.modules
        widths = {name: out if side == "b" else in_ for name, (out, in_) in sizes.items()}
        return _spread(upload.values["changes"], self._chosen(known, upload), widths, side)

    def _shared(self, server: RankScores, rnd: Round) -> Tensor:
        """The server's choice, the most important ranks first; it depends on the merged changes alone."""
        assert self.shared_rank is not None
        return server.first(_side(rnd), self.shared_rank)

    def _chosen(self, known: ClientRound, upload: Upload) -> dict[str, Tensor]:
        """Module -> the mask of the ranks whose changes are in the upload [rank]."""
        ranks = {name: known.spec.rank(name, self.rank) for name in known.spec.modules}
        if self.upload == "all":
            return {name: torch.ones(rank, dtype=torch.bool) for name, rank in ranks.items()}
        if self.shared_rank is not None:
            return _by_module(mask_of(known.download[_SHARED], sum(ranks.values())), ranks)
        budget = sum(_budget(known.spec, known.client).values())
        return _by_module(unpack_positions(upload.choices["positions"], budget, sum(ranks.values())), ranks)


def score(before: LowRank, after: LowRank, side: Side) -> Float[Tensor, "rank"]:
    """The Frobenius norm of the change of each rank's product, which is a product of two norms, as one factor changed."""
    b, a = (after.b - before.b, before.a) if side == "b" else (before.b, after.a - before.a)
    norms: Tensor = vector_norm(b, dim=0) * vector_norm(a, dim=1)
    return norms


def _side(rnd: Round) -> Side:
    return "a" if rnd.index % 2 else "b"


def _budget(spec: AdapterSpec, client: ClientInfo) -> dict[str, int]:
    return {name: spec.rank(name, client.rank) for name in spec.modules}


def _factors(download: Tensors) -> dict[str, LowRank]:
    return unpack(pick(download, "ba"), LowRank)


def _by_module(keep: Tensor, ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """The mask of all ranks as a mask of each module's."""
    return dict(zip(ranks, torch.split(keep, list(ranks.values())), strict=True))


def _widths(adapter: Mapping[str, LowRank], side: Side) -> dict[str, int]:
    """The number of entries that a rank of each module has in this factor."""
    return {name: _rows(part, side).shape[1] for name, part in adapter.items()}


def _spread(values: Tensor, chosen: Mapping[str, Tensor], widths: Mapping[str, int], side: Side) -> dict[str, Tensor]:
    """The changes of the chosen ranks at their positions in this factor, zeros elsewhere."""
    found, taken = dict[str, Tensor](), 0
    for name, own in chosen.items():
        rows = values.new_zeros(len(own), widths[name])
        size = int(own.sum()) * widths[name]
        rows[own] = values[taken : taken + size].view(-1, widths[name])
        found[f"{name}.{side}"] = rows.mT if side == "b" else rows
        taken += size
    return found


def _rows(part: LowRank, side: Side) -> Tensor:
    """The factor with its ranks as rows, [rank, out] or [rank, in]."""
    return part.b.mT if side == "b" else part.a


def _moved(adapter: Mapping[str, LowRank], moves: Tensors) -> dict[str, LowRank]:
    """The adapter with these changes added to one of its factors; the other is the same tensor."""
    return unpack({key: x + moves[key] if key in moves else x for key, x in pack(adapter).items()}, LowRank)
