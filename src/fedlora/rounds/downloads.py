"""Downloads of a round, and the base updates that are sent with them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedlora.adapter import Tensors
from fedlora.messages import ClientInfo, Round
from fedlora.rounds.backend import Backend
from fedlora.rounds.base_updates import BaseUpdateLog, BaseUpdateStore, pending_base_updates
from fedlora.rounds.codec import encoded_size
from fedlora.rounds.plan import Plan, RunState


@dataclass(frozen=True)
class Downloads:
    """Each client's download, and the pending base updates of those that have any. `base_updates` is the log before."""

    sent: Mapping[ClientInfo, Tensors]
    pending: Mapping[ClientInfo, Tensors]
    base_updates: BaseUpdateLog


def downloads(
    plan: Plan, backend: Backend, store: BaseUpdateStore, state: RunState, clients: Sequence[ClientInfo], rnd: Round
) -> Downloads:
    """The downloads of these clients for round `rnd`."""
    sent = {client: plan.method.send(state.server, client, rnd) for client in clients}
    base_updates = state.base_updates.known(backend.held())
    return Downloads(sent, pending_base_updates(plan.spec, store, base_updates, clients), base_updates)


def sizes(sent: Mapping[ClientInfo, Tensors]) -> Counter[str]:
    """Encoded size of what each client is sent, by its id. Unit: bytes."""
    return Counter({client.id: encoded_size(tensors) for client, tensors in sent.items()})
