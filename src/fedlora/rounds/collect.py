"""Collection of a round's uploads, one at a time."""

from typing import Any

from fedlora.messages import Mean, Reply
from fedlora.method import AnyMethod, ClientRound


def collect(method: AnyMethod, server: Any, collected: Any, reply: Reply, known: ClientRound) -> Any:
    """What the method merges, with one more accepted upload: a mean of the expanded uploads if that is all it needs."""
    if not method.collects_mean:
        return method.collect(server, collected, reply)
    mean = collected or Mean()
    mean.add(reply.weight, method.expand(known, reply.upload), reply.client.id)
    return mean
