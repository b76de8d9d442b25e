"""A merge as the round loop makes it, of replies that are given."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from fedlora.adapter import AdapterSpec
from fedlora.messages import Merged, Reply, Round
from fedlora.method import ClientRound, global_adapter
from fedlora.rounds.aggregation_error import ClientUpdates
from fedlora.rounds.collect import collect


def known_of(method: Any, server: Any, reply: Reply, spec: AdapterSpec) -> ClientRound:
    """The reply's round as it was known before."""
    client, rnd = reply.client, reply.round
    return ClientRound(spec, client, rnd, method.send(server, client, rnd), method.init_client(spec, client, rnd.seed))


def merge(method: Any, server: Any, replies: Iterable[Reply], spec: AdapterSpec, rnd: Round | None = None) -> Merged[Any]:
    """Collects the replies one by one, as a stream, and merges; the notes have the engine's `aggregation_error`."""
    collected, updates = None, ClientUpdates()
    for reply in replies:
        known = known_of(method, server, reply, spec)
        collected = collect(method, server, collected, reply, known)
        updates = updates.add(reply.weight, method.update(known, reply.upload))
        last = reply.round
    rnd = rnd or last
    merged = method.merge(server, collected, rnd)
    before, after = (global_adapter(method, spec, state, rnd) for state in (server, merged.server))
    error = updates.error(before, after, merged.base_update)
    return replace(merged, notes={**({} if error is None else {"aggregation_error": error}), **merged.notes})
