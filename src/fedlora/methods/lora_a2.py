"""LoRA-A2: trains b and a in alternate rounds; each client trains only the ranks that change most on its data."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.linalg import vector_norm

from fedlora.adapter import AdapterSpec, Tensors, low_rank, pack, unpack
from fedlora.linalg.lowrank import LowRank
from fedlora.linalg.sparse import largest, pack_positions, unpack_positions
from fedlora.messages import ClientInfo, Mean, Merged, Round, Upload
from fedlora.method import ClientRound, Local, Method, changes, fit
from fedlora.methods.flexlora import Sliced
from fedlora.ranges import PositiveFloat, PositiveInt, checked

Side = Literal["b", "a"]


@dataclass(frozen=True)
@checked
class LoRAA2(Method[Sliced, Mapping[str, int], Mean]):
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

    def init_server(self, spec: AdapterSpec, seed: int) -> Sliced:
        """Factors with zero update."""
        return Sliced.init(spec, self.rank, seed)

    def init_client(self, spec: AdapterSpec, client: ClientInfo, seed: int) -> Mapping[str, int]:
        """The modules in order, and the number of ranks that each adds to the budget; constant."""
        return _budget(spec, client)

    def send(self, server: Sliced, client: ClientInfo, rnd: Round) -> Tensors:
        """All ranks of both factors, since a client may have missed rounds."""
        return pack(server.adapter)

    def work(
        self, state: Mapping[str, int], download: Tensors, client: ClientInfo, rnd: Round
    ) -> Local[tuple[Mapping[str, int], Upload]]:
        """Probes, selects ranks, trains them from the downloaded adapter, and uploads their changes."""
        received = unpack(download, LowRank)
        start, side, rates = {name: received[name] for name in state}, _side(rnd), {"b": self.b_rate}
        ranks, budget = [part.rank for part in start.values()], sum(state.values())
        keep = torch.ones(sum(ranks), dtype=torch.bool)
        if budget < sum(ranks):
            after = low_rank((yield from fit(start, side, epochs=self.probe_epochs, rates=rates, role="probe")))
            keep = largest(torch.cat([score(part, after[name], side) for name, part in start.items()]), budget)
        chosen = dict(zip(start, torch.split(keep, ranks), strict=True))
        mask = {f"{name}.{side}": own[None] if side == "b" else own[:, None] for name, own in chosen.items()}
        trained = low_rank((yield from fit(start, side, mask=mask, rates=rates)))
        moves = {name: _rows(trained[name], side) - _rows(start[name], side) for name in chosen}
        if self.upload == "all":
            return state, Upload({"changes": torch.cat([x.flatten() for x in moves.values()])})
        kept = torch.cat([moves[name][own].flatten() for name, own in chosen.items()])
        return state, Upload({"changes": kept}, {"positions": pack_positions(keep)})

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
        """The changes of this round's factor at their positions, zeros elsewhere."""
        side, values, found, taken = _side(known.round), upload.values["changes"], dict[str, Tensor](), 0
        for name, own in self._chosen(known, upload).items():
            out, in_ = known.spec.modules[name]
            rows = values.new_zeros(len(own), out if side == "b" else in_)
            size = int(own.sum()) * rows.shape[1]
            rows[own] = values[taken : taken + size].view(-1, rows.shape[1])
            found[f"{name}.{side}"] = rows.mT if side == "b" else rows
            taken += size
        return found

    def merge(self, server: Sliced, collected: Mean, rnd: Round) -> Merged[Sliced]:
        """This round's factor plus the weighted mean of the changes, zero where a client trained nothing."""
        return Merged(replace(server, adapter=_moved(server.adapter, collected.tensors())))

    def update(self, known: ClientRound, upload: Upload) -> Mapping[str, LowRank]:
        """The changes of one factor, times the other."""
        received = unpack(known.download, LowRank)
        return changes(_moved(received, self.expand(known, upload)), received)

    def _chosen(self, known: ClientRound, upload: Upload) -> dict[str, Tensor]:
        """Module -> the mask of the ranks whose changes are in the upload [rank]."""
        ranks = {name: known.spec.rank(name, self.rank) for name in known.spec.modules}
        if self.upload == "all":
            return {name: torch.ones(rank, dtype=torch.bool) for name, rank in ranks.items()}
        budget = sum(_budget(known.spec, known.client).values())
        positions = unpack_positions(upload.choices["positions"], budget, sum(ranks.values()))
        return dict(zip(ranks, torch.split(positions, list(ranks.values())), strict=True))


def score(before: LowRank, after: LowRank, side: Side) -> Float[Tensor, "rank"]:
    """The Frobenius norm of the change of each rank's product, which is a product of two norms, as one factor changed."""
    b, a = (after.b - before.b, before.a) if side == "b" else (before.b, after.a - before.a)
    norms: Tensor = vector_norm(b, dim=0) * vector_norm(a, dim=1)
    return norms


def _side(rnd: Round) -> Side:
    return "a" if rnd.index % 2 else "b"


def _budget(spec: AdapterSpec, client: ClientInfo) -> dict[str, int]:
    return {name: spec.rank(name, client.rank) for name in spec.modules}


def _rows(part: LowRank, side: Side) -> Tensor:
    """The factor with its ranks as rows, [rank, out] or [rank, in]."""
    return part.b.mT if side == "b" else part.a


def _moved(adapter: Mapping[str, LowRank], moves: Tensors) -> dict[str, LowRank]:
    """The adapter with these changes added to one of its factors; the other is the same tensor."""
    return unpack({key: x + moves[key] if key in moves else x for key, x in pack(adapter).items()}, LowRank)
