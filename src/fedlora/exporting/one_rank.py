"""Adapters as factors of one rank that contain their scale, for servers that read neither patterns nor rsLoRA."""

from torch.nn.functional import pad

from fedlora.adapter import Adapter
from fedlora.exporting.write import two_factors, unfit_for_peft
from fedlora.linalg.lowrank import LowRank
from fedlora.models.adapted import AdaptedModel
from fedlora.parts.dora import Dora


def unfit_for_one_rank(adapter: Adapter, adapted: AdaptedModel) -> str | None:
    """Reason why factors of one rank, and nothing besides, cannot represent the adapter; None if they can."""
    if reason := unfit_for_peft(adapter, adapted):
        return reason
    if any(isinstance(part, Dora) for part in adapter.values()):
        return (
            "the adapter has DoRA's magnitudes, which vLLM, LoRAX and llama.cpp do not support; export a merged model "
            "(merged, gguf-merged)"
        )
    if own := [name for name, part in adapter.items() if part.in_head]:
        more = f" and {len(own) - 1} more" if len(own) > 1 else ""
        return f"{own[0]}{more} are not LoRA factors, and servers of adapters load nothing else; export a merged model"
    if embeddings := [name for name in adapter if name in adapted.spec.embeddings]:
        return f"{embeddings[0]} is an embedding, whose factors are not supported in this form; export a merged model"
    return None


def at_one_rank(adapter: Adapter) -> tuple[dict[str, LowRank], int]:
    """The same matrices as two factors, padded with zeros to the largest rank, and this rank.

    Factors contain their scale: alpha equals the rank. The adapter must not be `unfit_for_one_rank`.
    """
    factors = {name: two_factors(part) for name, part in adapter.items() if not part.in_head}
    rank = max(part.rank for part in factors.values())
    padded = {
        name: LowRank(b=pad(part.b, (0, rank - part.rank)), a=pad(part.a, (0, 0, 0, rank - part.rank)))
        for name, part in factors.items()
    }
    return padded, rank
